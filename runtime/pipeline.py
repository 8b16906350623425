"""The pipeline: load a bundle, generate from seeds, close. What servers, notebooks and commands all hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from . import noise
from .bundle import Bundle, NetworkName
from .conditions import check_guidance, open_conditions
from .decoder import Decoder
from .denoiser import Denoiser, engine_batch
from .engines import open_engine
from .engines.base import EngineOptions, Rest
from .errors import AccuQuantError
from .plan import SamplingPlan

MOST_ELEMENTS = 2**31  # of one input
OnStep = Callable[[int, int, np.ndarray], None]  # samples finished before this batch, steps done, latents
OnOutput = Callable[[int, np.ndarray, np.ndarray], None]  # row of the plan, its latents, the network's output


class Pipeline:
    """A bundle's sampling loop on an engine of this machine.

    A sample depends on its seed and condition alone: neither on its neighbours nor on where in a batch it stands.
    `plan` is the bundle's own unless given; a bundle whose graphs look timesteps up takes no others. `guidance` is what
    the bundle was calibrated with unless given; other than 1, every step calls the network with twice the batch, and
    samples may each have their own.

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
        self._check_ports()
        self.denoiser = Denoiser(self.engine, batch, guidance)
        self.conditions = open_conditions(self.bundle, engine, threads)
        self._decoder = Decoder(self.bundle, engine, batch, threads)

    def generate(
        self,
        seeds: Sequence[int],
        on_step: OnStep | None = None,
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        rows: Mapping[str, np.ndarray] | None = None,
        unwanted: str | Sequence[str] = "",
        guidance: Sequence[float] | None = None,
        on_output: OnOutput | None = None,
    ) -> np.ndarray:
        """Final latents, float32 (len(seeds), C, H, W), in the order of `seeds`.

        `classes`, `prompts` or `rows` (by input, float32) holds one for every seed, whichever the network takes;
        without it seed s is sampled under class s mod classes, or the bundle's example s mod examples. `unwanted` is a
        negative prompt, for all or for every seed. `guidance` has a strength for every seed, of a pipeline that was
        opened with guidance. `on_step` and `on_output` see whole batches, filled-up rows too, and may raise to stop.

        Raises:
            AccuQuantError: a seed or class out of range, a condition of the other kind, guidance or a negative prompt
                without the engine for it, or values that are not finite; names the step.
        """
        wrong = [s for s in seeds if not 0 <= s < 2**64]
        if wrong:
            raise AccuQuantError(f"seed {wrong[0]} is out of range; seeds are whole numbers from 0 to 2^64 - 1")
        given = None if rows is None else _one_by_one(rows)
        condition, free = self._condition(seeds, {"classes": classes, "prompts": prompts, "rows": given}, unwanted)
        strengths = self._strengths(seeds, guidance)
        results = []
        for first in range(0, len(seeds), self.batch):
            last = min(first + self.batch, len(seeds)) - 1
            # The engine's batch is fixed, so a short last chunk is filled up and cut off again.
            places = [min(i, last) for i in range(first, first + self.batch)]
            chosen = [seeds[i] for i in places]
            self.denoiser.under(_at(condition, places), None if free is None else _at(free, places))
            self.denoiser.guided_by([strengths[i] for i in places])
            results.append(self._sample(chosen, first, on_step, on_output)[: last + 1 - first])
        return np.concatenate(results)

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """Final latents as pixels: uint8 (N, H, W, channels)."""
        return self._decoder(latents)

    def _condition(
        self, seeds: Sequence[int], wanted: Mapping[str, Sequence[Any] | None], unwanted: str | Sequence[str]
    ) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray] | None]:
        """By input a row of the condition for every seed and, if guided, one that stands for none."""
        asked: dict[str, Sequence[Any]] = {}
        takes = "no condition" if self.conditions is None else self.conditions.takes
        for kind, given in wanted.items():
            if given is None:
                continue
            if kind != takes:
                raise AccuQuantError(f"{kind} were asked and the network takes {takes}; leave them out")
            if len(given) != len(seeds):
                raise AccuQuantError(f"{len(given)} {kind} for {len(seeds)} seeds; give one for each")
            asked[kind] = given
        avoided = [unwanted] * len(seeds) if isinstance(unwanted, str) else list(unwanted)
        if len(avoided) != len(seeds):
            raise AccuQuantError(f"{len(avoided)} negative prompts for {len(seeds)} seeds; give one for each")
        if any(avoided) and not self.denoiser.is_guided:
            raise AccuQuantError("a negative prompt takes effect through guidance; give a guidance above 1 with it")
        if self.conditions is None:
            return {}, None
        rows = self.conditions.rows(asked.get(takes, self.conditions.wishes(seeds)))
        if not self.denoiser.is_guided:
            return rows, None
        free = [self.conditions.free(text) for text in avoided]
        return rows, {name: np.stack([row[name] for row in free]) for name in rows}

    def _strengths(self, seeds: Sequence[int], guidance: Sequence[float] | None) -> Sequence[float]:
        strengths = [self.denoiser.guidance] * len(seeds) if guidance is None else guidance
        if len(strengths) != len(seeds):
            raise AccuQuantError(f"{len(strengths)} guidances for {len(seeds)} seeds; give one for each")
        for strength in strengths:
            check_guidance(self.bundle.manifest.conditioning, strength)
            if strength != 1.0 and not self.denoiser.is_guided:
                raise AccuQuantError(f"guidance {strength:g} was asked, but the engine was opened for none")
        return strengths

    def _sample(
        self, seeds: Sequence[int], first: int, on_step: OnStep | None, on_output: OnOutput | None
    ) -> np.ndarray:
        def after(i: int, x: np.ndarray) -> None:
            if on_step is not None:
                on_step(first, i + 1, x)

        return self.plan.sample(self.denoiser, lambda j: noise.batch(seeds, j, self.shape), after, on_output)

    def _check_timesteps(self) -> None:
        unknown = sorted(self.plan.timesteps - self.bundle.plan.timesteps)
        if unknown and self.bundle.manifest.timesteps == "plan":
            raise AccuQuantError(
                f"{self.bundle.folder} knows the {len(self.bundle.plan.timesteps)} timesteps of its own plan and not "
                f"{unknown[0]:g}; sample with its plan, or export for any with --no-time-table"
            )

    def _check_ports(self) -> None:
        """The graph is what the manifest says of it; nothing is allocated by the shapes of one that is not."""
        rows, known = self.engine.options.batch, self.bundle.manifest.conditioning
        wanted = {"x": (rows, *self.shape), "t": (rows,)}
        found = {port.name: port.shape for port in self.engine.inputs}
        named = {"x", "t", *(known.names if known is not None else ())}
        fits = found.keys() == named and all(found[name] == shape for name, shape in wanted.items())
        if not fits or any(math.prod(shape) > MOST_ELEMENTS for shape in found.values()):
            raise AccuQuantError(
                f"{self.engine.path} takes {found}; by the manifest it is {', '.join(sorted(named))}, with {wanted}; "
                "export it again"
            )

    def close(self) -> None:
        self.engine.close()
        self._decoder.close()
        if self.conditions is not None:
            self.conditions.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _at(rows: Mapping[str, np.ndarray], places: list[int]) -> dict[str, np.ndarray]:
    return {name: value[places] for name, value in rows.items()}


def _one_by_one(rows: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Rows (n, ...) by input as n rows."""
    counts = sorted({len(value) for value in rows.values()})
    if len(counts) != 1:
        raise AccuQuantError(f"{counts} rows were given; give as many of every input")
    return [{name: value[i] for name, value in rows.items()} for i in range(counts[0])]
