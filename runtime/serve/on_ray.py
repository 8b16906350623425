"""Beyond one machine, with Ray: many pictures on many workers.

A picture depends on its seed and wishes alone, never on the worker that paints it or on what that one paints besides.
Every worker opens the bundle from its folder, and the conditions from their file, which all machines must see under the
same paths.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, NetworkName
from ..conditions import read_conditions
from ..engines.base import Rest
from ..pipeline import Pipeline
from ..plan import SamplingPlan
from ..spread import Chunk, map_chunks


@dataclass(frozen=True)
class Opening:
    """How every worker opens the bundle: arguments of Pipeline, and a file of conditions.

    `threads` is one number for all, because another one might round otherwise; of a machine's cores, a worker takes as
    many. Bundles for GPUs take one GPU each.
    """

    folder: Path
    network: NetworkName = "denoiser"
    engine: str = "auto"
    batch: int = 8
    threads: int = 1
    rest: Rest = "float32"
    guidance: float | None = None
    plan: SamplingPlan | None = None
    conditions: Path | None = None

    def pipeline(self) -> Pipeline:
        return Pipeline(
            self.folder, network=self.network, engine=self.engine, batch=self.batch, threads=self.threads,
            rest=self.rest, guidance=self.guidance, plan=self.plan,
        )  # fmt: skip


class _Sampler:
    """A worker: it opens the bundle once and paints chunks of wishes."""

    def __init__(self, opening: Opening, decoded: bool) -> None:
        self._pipeline, self._decoded = opening.pipeline(), decoded
        path = opening.conditions
        self._given = None if path is None else read_conditions(self._pipeline.bundle, path)

    def __call__(self, wishes: Chunk) -> dict[str, np.ndarray]:
        asked = dict(wishes)
        if self._given is not None:
            asked["rows"] = self._given.of(asked["rows"])
        latents = self._pipeline.generate(**asked)
        return {"made": self._pipeline.pictures(latents) if self._decoded else latents}


def sample(
    opening: Opening, wishes: Mapping[str, Sequence[Any]], workers: int, *, decoded: bool = True
) -> Iterator[np.ndarray]:
    """Paint on `workers` processes; yields pictures, uint8 (n, H, W, C), or latents, float32 (n, C, H, W), by batches.

    They come in the order of the wishes, which are `Pipeline.generate`'s arguments with one value for every picture; of
    a file of conditions, `rows` are the numbers of its rows.

    Raises:
        AccuQuantError: as `Bundle`, before any worker starts, and as `Pipeline` and `Pipeline.generate`.
    """
    given = opening.conditions
    opening = replace(opening, folder=opening.folder.resolve(), conditions=given and given.resolve())
    on_gpu = Bundle(opening.folder).manifest.target == "tensorrt"
    count = len(wishes["seeds"])
    chunks = [
        {name: list(values[first : first + opening.batch]) for name, values in wishes.items()}
        for first in range(0, count, opening.batch)
    ]
    arguments = {"opening": opening, "decoded": decoded}
    for made in map_chunks(
        _Sampler, arguments, chunks, workers, size=opening.batch, threads=opening.threads, on_gpu=on_gpu
    ):
        yield made["made"]
