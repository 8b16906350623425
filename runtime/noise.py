"""Noise that depends on nothing but the sample's seed and the step.

Philox-4x64 is a counter-based generator: its k-th output is a pure function of (key, counter), and its raw stream is
fixed for all numpy releases (numpy promises that of bit generators, not of `standard_normal`). Box-Muller turns pairs
of uniforms into normals:

    z_0 = sqrt(-2 ln u_1) cos(2 pi u_2),   z_1 = sqrt(-2 ln u_1) sin(2 pi u_2),     u_1 in (0, 1], u_2 in [0, 1)

So a sample does not change with its neighbours, with the batch size, with the engine, or with torch's presence.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from collections.abc import Sequence

import numpy as np


def normal(seed: int, index: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 of `shape` for `seed` in [0, 2^64); index -1 starts the chain, j belongs to step j."""
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    # The counter's high words hold the step: every (seed, step) owns 2^128 draws that no other one touches.
    raw = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=[0, 0, index + 1, 0]).random_raw(2 * pairs)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    pair = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return pair[:count].astype(np.float32).reshape(shape)


def batch(seeds: Sequence[int], index: int, shape: Sequence[int]) -> np.ndarray:
    """Noise of several samples, stacked: (len(seeds), *shape)."""
    return np.stack([normal(seed, index, shape) for seed in seeds])
