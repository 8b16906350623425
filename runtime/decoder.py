"""From final latents to pixels: through the bundle's decoder where it has one, else latents are the pictures."""

import numpy as np

from .bundle import Bundle
from .engines import open_engine
from .engines.base import Engine, EngineOptions
from .errors import AccuQuantError
from .pictures import to_uint8


class Decoder:
    """Opened with the first picture that is wanted: whoever samples latents alone does without it."""

    def __init__(self, bundle: Bundle, engine: str, batch: int, threads: int) -> None:
        self._bundle, self._name, self._options = bundle, engine, EngineOptions(batch, threads)
        self._engine: Engine | None = None

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, channels) of float32 (N, C, H, W)."""
        if "decoder" not in self._bundle.manifest.networks:
            return to_uint8(latents)
        if self._engine is None:
            graph, target = self._bundle.graph("decoder"), self._bundle.manifest.target
            self._engine = open_engine(graph, self._options, self._name, target)
            shape = (self._options.batch, *latents.shape[1:])
            if [port.shape for port in self._engine.inputs] != [shape]:
                raise AccuQuantError(f"{graph} does not take latents of {shape}, which the manifest says; export again")
        port, batch = self._engine.inputs[0], self._options.batch
        made = []
        for first in range(0, len(latents), batch):
            some = latents[first : first + batch]
            full = np.zeros(port.shape, np.float32)
            full[: len(some)] = some
            made.append(to_uint8(self._engine.run({port.name: full})[: len(some)]))
        return np.concatenate(made)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
