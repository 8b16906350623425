"""The network as a sampler calls it: latent and timestep in, prediction out; condition and guidance are its own affair.

    o = o_0 + g (o_c - o_0),        o_c = f(x, t; c),  o_0 = f(x, t; nothing)

With guidance (Ho and Salimans, 2022) both outputs come from one engine call of twice the batch: first the rows under
their condition, then the same rows under none. Its strength and what stands for none are every sample's own.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .engines.base import Engine
from .errors import AccuQuantError


def engine_batch(batch: int, guidance: float) -> int:
    """Rows of one engine call for `batch` samples."""
    return batch if guidance == 1.0 else 2 * batch


class Denoiser:
    """An engine whose batch is `engine_batch(batch, guidance)`, called with `batch` latents.

    `guidance` is that of all samples until `guided_by` gives each its own; an engine for 1 has no rows to guide with.
    """

    def __init__(self, engine: Engine, batch: int, guidance: float = 1.0) -> None:
        self.engine, self.batch, self.guidance = engine, batch, guidance
        self.is_guided = guidance != 1.0
        self._strength = np.float32(guidance) * np.ones((batch, 1, 1, 1), np.float32)
        self._fed = {port.name: np.zeros(port.shape, port.dtype) for port in engine.inputs}

    def under(self, rows: Mapping[str, np.ndarray], free: Mapping[str, np.ndarray] | None = None) -> None:
        """Put the next calls under a condition: `rows` (batch, ...) by input; if guided, `free` too.

        `free` has (...) by input, or (batch, ...) where samples differ in what stands for none.
        """
        for name, value in rows.items():
            if value.shape[1:] != self._fed[name].shape[1:]:
                raise AccuQuantError(
                    f"{self.engine.path.name} takes rows {self._fed[name].shape[1:]} as {name}, not {value.shape[1:]}"
                )
            self._fed[name][: self.batch] = value
            if self.is_guided:
                assert free is not None
                self._fed[name][self.batch :] = free[name]

    def guided_by(self, strengths: Sequence[float]) -> None:
        """Guide the next calls' samples by `strengths` (batch,)."""
        self._strength = np.asarray(strengths, np.float32).reshape(-1, 1, 1, 1)

    def feed(self, x: np.ndarray, timestep: float) -> Mapping[str, np.ndarray]:
        """The engine's inputs for latents (batch, C, H, W): always the same arrays, filled anew."""
        self._fed["x"][: self.batch] = x
        if self.is_guided:
            self._fed["x"][self.batch :] = x
        self._fed["t"].fill(timestep)
        return self._fed

    def __call__(self, x: np.ndarray, timestep: float) -> np.ndarray:
        """The prediction, guided where asked, as an array of its own."""
        fed = self.feed(x, timestep)
        out = self.engine.run(fed)
        if out.shape != fed["x"].shape:
            raise AccuQuantError(f"{self.engine.path.name} gives {out.shape} for latents of {fed['x'].shape}")
        if not self.is_guided:
            return out.copy()  # multistep samplers keep outputs, the engine's buffer is overwritten by the next call
        free = out[self.batch :]
        guided: np.ndarray = free + self._strength * (out[: self.batch] - free)
        return guided
