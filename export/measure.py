"""The proof beside the engine: both twins sampled from the same seeds, compared picture by picture and step by step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.bundle import Bundle, NetworkName
from ..runtime.fidelity import psnr, ssim
from ..runtime.inspection import operator_precisions
from ..runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Comparison:
    """Pictures uint8 (N, H, W, C), fidelity (N,), relative drift (steps, N), seconds per side, kernels by operator."""

    fp: np.ndarray
    quantized: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    drift: np.ndarray
    seconds: dict[str, float]
    engine: str
    runs_as: dict[str, str]
    kept_in_float: Mapping[str, str]  # by the engine, with its reasons


def compare_twins(bundle: Bundle, n: int, seed: int, progress: Any, batch: int = 8) -> Comparison:
    """Sample seeds seed..seed+n-1 with both networks of the bundle on this machine's best engine."""
    paths: dict[NetworkName, np.ndarray] = {}
    pictures: dict[NetworkName, np.ndarray] = {}
    seconds: dict[str, float] = {}
    sides: tuple[NetworkName, NetworkName] = ("twin", "denoiser")
    engine, runs_as, kept_in_float = "", dict[str, str](), dict[str, str]()
    steps = len(bundle.plan)
    for k, side in enumerate(sides):
        kept = np.empty((steps, n, *bundle.manifest.sample_shape), np.float32)

        def on_step(first: int, done: int, x: np.ndarray, kept: np.ndarray = kept, k: int = k) -> None:
            count = min(len(x), n - first)
            kept[done - 1, first : first + count] = x[:count]
            progress((k * n + first) * steps + done * count, 2 * n * steps)

        with Pipeline(bundle, network=side, batch=min(batch, n)) as pipeline:
            begun = time.perf_counter()
            latents = pipeline.generate(range(seed, seed + n), on_step)
            seconds[side] = time.perf_counter() - begun
            paths[side], pictures[side] = kept, pipeline.pictures(latents)
            if side == "denoiser":
                engine = pipeline.engine.name
                runs_as = operator_precisions(pipeline.engine, bundle.manifest.operators)
                kept_in_float = dict(pipeline.engine.kept_in_float)
    flat = {side: path.reshape(steps, n, -1) for side, path in paths.items()}
    drift = np.linalg.norm(flat["denoiser"] - flat["twin"], axis=2) / np.linalg.norm(flat["twin"], axis=2)
    fp, quantized = pictures["twin"], pictures["denoiser"]
    alike = psnr(fp, quantized), ssim(fp, quantized)
    return Comparison(fp, quantized, *alike, drift, seconds, engine, runs_as, kept_in_float)
