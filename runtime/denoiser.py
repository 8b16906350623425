"""The network as a sampler calls it: latent and timestep in, prediction out; condition and guidance are its own affair.

    o = o_0 + g (o_c - o_0),        o_c = f(x, t; c),  o_0 = f(x, t; nothing)

With guidance (Ho and Salimans, 2022) both outputs come from one engine call of twice the batch: first the rows under
their condition, then the same rows under none.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .bundle import Conditioning
from .engines.base import Engine
from .errors import AccuQuantError


def engine_batch(batch: int, guidance: float) -> int:
    """Rows of one engine call for `batch` samples."""
    return batch if guidance == 1.0 else 2 * batch


def drawn(seeds: Sequence[int], classes: int) -> np.ndarray:
    """The class of every seed that nobody chose one for: int64 (len(seeds),)."""
    return np.array([seed % classes for seed in seeds], np.int64)


def check_guidance(conditioning: Conditioning | None, guidance: float) -> None:
    """Raises AccuQuantError if a network cannot be guided by that much."""
    if not np.isfinite(guidance) or guidance < 0:
        raise AccuQuantError(f"guidance {guidance:g} is out of range; 1 is none, models are used with 1.5 to 8")
    if guidance != 1.0 and (conditioning is None or conditioning.null is None):
        why = "takes no condition" if conditioning is None else "has no class that stands for none"
        raise AccuQuantError(f"guidance {guidance:g} was asked and the network {why}; leave guidance out")


class Denoiser:
    """An engine whose batch is `engine_batch(batch, guidance)`, called with `batch` latents."""

    def __init__(
        self, engine: Engine, batch: int, conditioning: Conditioning | None = None, guidance: float = 1.0
    ) -> None:
        check_guidance(conditioning, guidance)
        self.engine, self.batch, self.guidance = engine, batch, guidance
        self._conditioning = conditioning
        self._guided = guidance != 1.0
        self._fed = {port.name: np.zeros(port.shape, port.dtype) for port in engine.inputs}
        self.under(range(batch))

    def under(self, seeds: Sequence[int], classes: Sequence[int] | None = None) -> None:
        """Put the next calls under a condition: a class for every sample, by its seed where none is given.

        Raises:
            AccuQuantError: the network takes no classes, has none of that number, or there is not one a sample.
        """
        known = self._conditioning
        if known is None:
            if classes is not None:
                raise AccuQuantError("classes were asked of a network that takes no condition; leave them out")
            return
        chosen = drawn(seeds, known.classes) if classes is None else np.array(classes, np.int64)
        if chosen.shape != (self.batch,):
            raise AccuQuantError(f"{chosen.size} classes for {self.batch} samples; give one for each")
        wrong = chosen[(chosen < 0) | (chosen >= known.classes)]
        if len(wrong):
            raise AccuQuantError(f"class {wrong[0]} is out of range; the network knows 0 to {known.classes - 1}")
        rows = self._fed[known.input]
        rows[: self.batch] = chosen
        if self._guided:
            rows[self.batch :] = known.null

    def feed(self, x: np.ndarray, timestep: float) -> Mapping[str, np.ndarray]:
        """The engine's inputs for latents (batch, C, H, W): always the same arrays, filled anew."""
        self._fed["x"][: self.batch] = x
        if self._guided:
            self._fed["x"][self.batch :] = x
        self._fed["t"].fill(timestep)
        return self._fed

    def __call__(self, x: np.ndarray, timestep: float) -> np.ndarray:
        """The prediction, guided where asked, as an array of its own."""
        out = self.engine.run(self.feed(x, timestep))
        if not self._guided:
            return out.copy()  # multistep samplers keep outputs, the engine's buffer is overwritten by the next call
        free = out[self.batch :]
        guided: np.ndarray = free + np.float32(self.guidance) * (out[: self.batch] - free)
        return guided
