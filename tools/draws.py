"""What is evaluated: pictures drawn from a bundle or a checkpoint by their seeds, or read from disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.runtime.bundle import Bundle, ByText, NetworkName
from accuquant.runtime.conditions import prompts_of
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import sha256
from accuquant.runtime.pictures import to_uint8
from accuquant.runtime.pipeline import Pipeline
from accuquant.runtime.plan import SamplingPlan
from picture_sets import PictureSet, Split, read_set

Show = Callable[[str, int, int, str], None]  # stage, done, total, note
SEEDS = 256  # drawn and decoded at a time: the latents of fifty thousand would fill the memory


@dataclass(frozen=True)
class Subject:
    """Sets under judgement, the first of them in question; of two, picture i of one belongs to picture i of the other.

    `facts` go into the report; `seeds` is None where pictures come from disk, `texts` where none were drawn from texts.
    """

    sets: tuple[PictureSet, ...]
    facts: dict[str, Any]
    seeds: range | None = None
    texts: Sequence[str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.sets[0])


@dataclass(frozen=True)
class Wish:
    """How pictures are drawn; what is None is the bundle's or the model's own."""

    n: int
    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    plan: Path | None = None
    guidance: float | None = None
    texts: Sequence[str] | None = None
    engine: str = "auto"
    batch: int = 16
    threads: int = 0
    device: str = "cpu"
    ray: int = 0  # workers; 0 draws in this process

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.n)


def of_bundle(folder: Path, wish: Wish, twin: bool, show: Show) -> Subject:
    """The quantized network's pictures and, with `twin`, those of the full-precision one from the same seeds.

    Raises:
        AccuQuantError: what a bundle's own plan decides was asked otherwise, or a plan with timesteps it does not know.
    """
    bundle = Bundle(folder)
    manifest = bundle.manifest
    if wish.sampler is not None or wish.steps not in (None, len(bundle.plan)):
        raise AccuQuantError(
            f"{folder} is sampled with its own plan ({manifest.sampler}, {len(bundle.plan)} network calls); name "
            "another with --plan, or export again with --sampler and --steps"
        )
    plan = SamplingPlan.load(wish.plan) if wish.plan else None
    texts = wish.texts
    if texts is None and isinstance(manifest.conditioning, ByText):
        texts = prompts_of(wish.seeds, manifest.conditioning.examples)
    sides: list[tuple[str, NetworkName]] = [("quantized", "denoiser")] + ([("fp", "twin")] if twin else [])
    wishes: dict[str, Sequence[Any]] = {"seeds": wish.seeds} | ({} if texts is None else {"prompts": texts})
    sets, engine = [], f"{wish.engine}, {wish.ray} workers of Ray"
    for name, network in sides:
        opening: dict[str, Any] = {
            "network": network, "engine": wish.engine, "batch": min(wish.batch, wish.n), "plan": plan,
            "guidance": wish.guidance,
        }  # fmt: skip
        parts, done = [], 0
        with ExitStack() as held:
            if wish.ray:
                from accuquant.runtime.serve.on_ray import Opening, sample

                drawn = sample(Opening(folder, threads=wish.threads or 1, **opening), wishes, wish.ray)
            else:
                pipeline = held.enter_context(Pipeline(bundle, threads=wish.threads, **opening))
                drawn, engine = _drawn(pipeline, wishes), pipeline.engine.name
            for pixels in drawn:
                parts.append(pixels)
                done += len(pixels)
                show(f"sampling {name}", done, wish.n, "")
        sets.append(PictureSet(name, np.concatenate(parts)))
    usual = 1.0 if manifest.conditioning is None else manifest.conditioning.guidance
    facts = {
        "bundle": folder.name,
        "manifest_sha256": sha256(folder / "manifest.json"),
        "found": manifest.found,
        "scheme": manifest.scheme,
        "sampler": plan.sampler if plan else manifest.sampler,
        "calls": len(plan or bundle.plan),
        "guidance": usual if wish.guidance is None else wish.guidance,
        "engine": engine,
    }
    return Subject(tuple(sets), facts, wish.seeds, texts)


def _drawn(pipeline: Pipeline, wishes: Mapping[str, Sequence[Any]]) -> Iterator[np.ndarray]:
    """Pictures of a pipeline in this process, some at a time."""
    for first in range(0, len(wishes["seeds"]), SEEDS):
        some = {name: values[first : first + SEEDS] for name, values in wishes.items()}
        yield pipeline.pictures(pipeline.generate(**some))


def of_checkpoint(path: Path, config: Path | None, wish: Wish, show: Show) -> Subject:
    """Pictures of a checkpoint in full precision, by torch.

    Raises:
        AccuQuantError: no known checkpoint or sampler, or values that are not finite.
    """
    if wish.plan is not None or wish.texts is not None:
        raise AccuQuantError(f"--plan and --prompts belong to bundles; {path} is a checkpoint, sampled with --sampler")
    model = load_model(path, config)
    sampler, steps = wish.sampler or model.default_sampler, wish.steps or model.default_steps
    plan = trace(sampler, model.noise_schedule, steps)
    guidance = wish.guidance
    if guidance is None:
        guidance = 1.0 if model.conditioning is None else model.conditioning.guidance
    network, decoder = model.guided(guidance).to(wish.device), model.decoder
    chunks = [wish.seeds[first : first + wish.batch] for first in range(0, wish.n, wish.batch)]
    if wish.ray:
        from accuquant.calibrate.teacher_on_ray import finals_on_ray

        condition = model.condition(wish.seeds)
        finals = finals_on_ray(
            network, plan, wish.seeds, model.sample_shape, condition,
            workers=wish.ray, threads=wish.threads or 1, batch=wish.batch,
        )  # fmt: skip
    else:
        runs = (simulate(network, plan, c, model.sample_shape, model.condition(c), batch=wish.batch) for c in chunks)
        finals = (run.states[-1] for run in runs)
    parts = []
    for chunk, final in zip(chunks, finals, strict=True):
        if not torch.isfinite(final).all():
            raise AccuQuantError(
                f"seeds {chunk[0]}..{chunk[-1]} end in values that are not finite; check the checkpoint, or choose "
                "another --sampler"
            )
        with torch.no_grad():
            parts.append(to_uint8((final if decoder is None else decoder(final)).numpy()))
        show("sampling fp", chunk[-1] + 1 - wish.seed, wish.n, "")
    facts = {
        "checkpoint": path.name,
        "sha256": sha256(path),
        "found": model.found,
        "scheme": "float32",
        "sampler": sampler,
        "steps": steps,
        "calls": len(plan),
        "guidance": guidance,
        "engine": f"torch {torch.__version__}, {wish.device}" + (f", {wish.ray} workers of Ray" if wish.ray else ""),
    }
    return Subject((PictureSet("fp", np.concatenate(parts)),), facts, wish.seeds)


def of_files(path: Path, against: Path | None, split: Split, texts: Sequence[str] | None) -> Subject:
    """Pictures of a folder or an array and, with `against`, those each of them is paired with.

    Raises:
        AccuQuantError: sets that cannot be paired: of other sizes, counts or file names; or texts of another count.
    """
    sets = [read_set(path, split)] + ([read_set(against, split)] if against else [])
    if against is not None:
        a, b = sets
        if a.pixels.shape != b.pixels.shape:
            raise AccuQuantError(f"{path} holds {a.pixels.shape} and {against} {b.pixels.shape}; pairs are of one size")
        odd = sorted(set(a.files) ^ set(b.files)) if a.files and b.files else []
        if odd:
            raise AccuQuantError(f"{path} and {against} are paired by file name, and {odd[0]} is in one of them only")
        if a.name == b.name:
            sets = [PictureSet("first", a.pixels), PictureSet("second", b.pixels)]
    if texts is not None and len(texts) != len(sets[0]):
        raise AccuQuantError(f"{len(texts)} prompts for {len(sets[0])} pictures; give one for each, in their order")
    return Subject(tuple(sets), {"pictures": str(path), "against": against and str(against)}, texts=texts)
