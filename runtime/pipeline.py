"""The pipeline: load a bundle, generate from seeds, close. What servers, notebooks and commands all hold."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from . import noise
from .bundle import Bundle, NetworkName
from .denoiser import Denoiser, check_guidance, engine_batch
from .engines import open_engine
from .engines.base import EngineOptions, Rest
from .errors import AccuQuantError
from .plan import SamplingPlan

OnStep = Callable[[int, int, np.ndarray], None]  # samples finished before this batch, steps done, latents


class Pipeline:
    """A bundle's sampling loop on an engine of this machine.

    A sample depends on its seed and condition alone: neither on its neighbours nor on where in a batch it stands.
    `plan` is the bundle's own unless given; a bundle whose graphs look timesteps up takes no others. `guidance` is what
    the bundle was calibrated with unless given; other than 1, every step calls the network with twice the batch.

    Raises:
        AccuQuantError: a plan that visits timesteps the graphs do not know; guidance of a network that cannot be
            guided; no engine for the bundle.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        network: NetworkName = "denoiser",
        engine: str = "auto",
        batch: int = 8,
        threads: int = 0,
        rest: Rest = "float32",
        plan: SamplingPlan | None = None,
        guidance: float | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))
        manifest = self.bundle.manifest
        self.shape, known = manifest.sample_shape, manifest.conditioning
        self.plan = plan or self.bundle.plan
        self._check_timesteps()
        self.batch = batch
        if guidance is None:
            guidance = known.guidance if known is not None else 1.0
        check_guidance(known, guidance)
        options = EngineOptions(engine_batch(batch, guidance), threads, rest)
        self.engine = open_engine(self.bundle.graph(network), options, engine, manifest.target)
        self.denoiser = Denoiser(self.engine, batch, known, guidance)

    def generate(
        self, seeds: Sequence[int], on_step: OnStep | None = None, *, classes: Sequence[int] | None = None
    ) -> np.ndarray:
        """Final latents, float32 (len(seeds), C, H, W), in the order of `seeds`.

        `classes` holds one for every seed; without it, seed s of a class-conditional network is of class s mod classes.

        Raises:
            AccuQuantError: a seed or class out of range, or values that are not finite; names the step.
        """
        wrong = [s for s in seeds if not 0 <= s < 2**64]
        if wrong:
            raise AccuQuantError(f"seed {wrong[0]} is out of range; seeds are whole numbers from 0 to 2^64 - 1")
        if classes is not None and len(classes) != len(seeds):
            raise AccuQuantError(f"{len(classes)} classes for {len(seeds)} seeds; give one for each")
        results = []
        for first in range(0, len(seeds), self.batch):
            last = min(first + self.batch, len(seeds)) - 1
            # The engine's batch is fixed, so a short last chunk is filled up and cut off again.
            rows = [min(i, last) for i in range(first, first + self.batch)]
            chosen = [seeds[i] for i in rows]
            self.denoiser.under(chosen, None if classes is None else [classes[i] for i in rows])
            results.append(self._sample(chosen, first, on_step)[: last + 1 - first])
        return np.concatenate(results)

    def _sample(self, seeds: Sequence[int], first: int, on_step: OnStep | None) -> np.ndarray:
        def after(i: int, x: np.ndarray) -> None:
            if on_step is not None:
                on_step(first, i + 1, x)

        return self.plan.sample(self.denoiser, lambda j: noise.batch(seeds, j, self.shape), after)

    def _check_timesteps(self) -> None:
        unknown = sorted(self.plan.timesteps - self.bundle.plan.timesteps)
        if unknown and self.bundle.manifest.timesteps == "plan":
            raise AccuQuantError(
                f"{self.bundle.folder} knows the {len(self.bundle.plan.timesteps)} timesteps of its own plan and not "
                f"{unknown[0]:g}; sample with its plan, or export for any with --no-time-table"
            )

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
