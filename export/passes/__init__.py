"""Graph rewrites on onnx-ir, one idea per file, each with what it requires and what it ensures."""
