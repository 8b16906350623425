"""The pipeline: load a bundle, generate from seeds, close. What servers, notebooks and commands all hold."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from . import noise
from .bundle import Bundle, NetworkName
from .engines import open_engine
from .engines.base import EngineOptions, Rest
from .errors import AccuQuantError
from .plan import SamplingPlan

OnStep = Callable[[int, int, np.ndarray], None]  # samples finished before this batch, steps done, latents


class Pipeline:
    """A bundle's sampling loop on an engine of this machine.

    A sample depends on its seed alone: neither on its neighbours nor on where in a batch it stands.
    `plan` is the bundle's own unless given; a bundle whose graphs look timesteps up takes no others.

    Raises:
        AccuQuantError: a plan that visits timesteps the graphs do not know; no engine for the bundle.
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
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))
        self.shape = self.bundle.manifest.sample_shape
        self.plan = plan or self.bundle.plan
        self._check_timesteps()
        self.batch = batch
        options, target = EngineOptions(batch, threads, rest), self.bundle.manifest.target
        self.engine = open_engine(self.bundle.graph(network), options, engine, target)

    def generate(self, seeds: Sequence[int], on_step: OnStep | None = None) -> np.ndarray:
        """Final latents, float32 (len(seeds), C, H, W), in the order of `seeds`.

        Raises:
            AccuQuantError: a seed out of range, or values that are not finite; names the step.
        """
        wrong = [s for s in seeds if not 0 <= s < 2**64]
        if wrong:
            raise AccuQuantError(f"seed {wrong[0]} is out of range; seeds are whole numbers from 0 to 2^64 - 1")
        results = []
        for first in range(0, len(seeds), self.batch):
            chunk = list(seeds[first : first + self.batch])
            # The engine's batch is fixed, so a short last chunk is filled up and cut off again.
            full = chunk + [chunk[-1]] * (self.batch - len(chunk))
            results.append(self._sample(full, first, on_step)[: len(chunk)])
        return np.concatenate(results)

    def _sample(self, seeds: Sequence[int], first: int, on_step: OnStep | None) -> np.ndarray:
        t = np.empty(len(seeds), np.float32)

        def network(x: np.ndarray, timestep: float) -> np.ndarray:
            t.fill(timestep)
            # A copy: multistep samplers keep outputs, the engine's buffer is overwritten by the next call.
            return self.engine.run({"x": x, "t": t}).copy()

        def after(i: int, x: np.ndarray) -> None:
            if on_step is not None:
                on_step(first, i + 1, x)

        return self.plan.sample(network, lambda j: noise.batch(seeds, j, self.shape), after)

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
