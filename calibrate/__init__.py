"""Learns quantization parameters: teacher trajectories, the multi-step objective, the frozen recipe."""
