"""Beyond one machine, with Ray: many pictures on many workers (Ray Data).

A picture depends on its seed and wishes alone, never on the worker that paints it or on what that one paints besides.
So one worker and twenty make the same bytes, and work that died with a worker is simply done again by another. Every
worker opens the bundle from its folder, which all machines must see under the same path.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, NetworkName
from ..engines.base import Rest
from ..errors import AccuQuantError
from ..pipeline import Pipeline
from ..plan import SamplingPlan

try:
    import ray
    import ray.data
except ImportError:
    raise AccuQuantError("Ray is not installed; install it with: pip install 'accuquant[ray]'") from None


@dataclass(frozen=True)
class Opening:
    """How every worker opens the bundle: arguments of Pipeline.

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

    def pipeline(self) -> Pipeline:
        return Pipeline(
            self.folder, network=self.network, engine=self.engine, batch=self.batch, threads=self.threads,
            rest=self.rest, guidance=self.guidance, plan=self.plan,
        )  # fmt: skip

    @property
    def needs(self) -> dict[str, Any]:
        """What Ray reserves for a worker."""
        on_gpu = Bundle(self.folder).manifest.target == "tensorrt"
        return {"num_gpus": 1} if on_gpu else {"num_cpus": self.threads}


class _Sampler:
    """A worker: it opens the bundle once and paints batches of jobs."""

    def __init__(self, opening: Opening, decoded: bool) -> None:
        self._pipeline, self._decoded = opening.pipeline(), decoded

    def __call__(self, jobs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wishes = {name: column.tolist() for name, column in jobs.items()}
        latents = self._pipeline.generate(**wishes)
        return {"made": self._pipeline.pictures(latents) if self._decoded else latents}


def sample(
    opening: Opening, wishes: Mapping[str, Sequence[Any]], workers: int, *, decoded: bool = True
) -> Iterator[np.ndarray]:
    """Paint on `workers` processes; yields pictures, uint8 (n, H, W, C), or latents, float32 (n, C, H, W), by batches.

    They come in the order of the wishes, which are `Pipeline.generate`'s arguments with one value for every picture.
    A cluster is used where RAY_ADDRESS names one; else this machine, with as many workers as asked.

    Raises:
        AccuQuantError: as `Bundle`, before any worker starts, and as `Pipeline` and `Pipeline.generate`.
    """
    opening = replace(opening, folder=opening.folder.resolve())
    needs = opening.needs
    if not ray.is_initialized():
        cores = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * opening.threads}
        ray.init(**cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    jobs = [dict(zip(wishes, values, strict=True)) for values in zip(*wishes.values(), strict=True)]
    for job in jobs:  # else a column would be of whole numbers below 2^63, or of objects
        job["seeds"] = np.uint64(job["seeds"]) if 0 <= job["seeds"] < 2**64 else job["seeds"]
    batches = -(-len(jobs) // opening.batch)
    with ray.data.DataContext.current(context):
        painted = ray.data.from_items(jobs, override_num_blocks=batches).map_batches(
            _Sampler,
            fn_constructor_kwargs={"opening": opening, "decoded": decoded},
            batch_size=opening.batch,
            compute=ray.data.ActorPoolStrategy(size=min(workers, batches)),
            **needs,
        )
    try:
        for batch in painted.iter_batches(batch_size=opening.batch, batch_format="numpy"):
            yield batch["made"]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AccuQuantError):
            raise error.cause from None
        raise
