"""What is evaluated: pictures drawn from a bundle or a checkpoint by their seeds, or read from disk."""

from collections.abc import Callable, Sequence
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
    sets, engine, calls, guidance = [], "", 0, 1.0
    for name, network in sides:
        with Pipeline(
            bundle, network=network, engine=wish.engine, batch=min(wish.batch, wish.n), threads=wish.threads,
            plan=plan, guidance=wish.guidance,
        ) as pipeline:  # fmt: skip
            engine, calls, guidance = pipeline.engine.name, len(pipeline.plan), pipeline.denoiser.guidance
            parts = []
            for first in range(0, wish.n, SEEDS):
                rows = slice(first, min(first + SEEDS, wish.n))
                some = texts[rows] if texts is not None else None
                latents = pipeline.generate(wish.seeds[rows], prompts=some)
                parts.append(pipeline.pictures(latents))
                show(f"sampling {name}", rows.stop, wish.n, "")
        sets.append(PictureSet(name, np.concatenate(parts)))
    facts = {
        "bundle": folder.name,
        "manifest_sha256": sha256(folder / "manifest.json"),
        "found": manifest.found,
        "scheme": manifest.scheme,
        "sampler": plan.sampler if plan else manifest.sampler,
        "calls": calls,
        "guidance": guidance,
        "engine": engine,
    }
    return Subject(tuple(sets), facts, wish.seeds, texts)


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
    parts = []
    for first in range(0, wish.n, wish.batch):
        chunk = wish.seeds[first : first + wish.batch]
        run = simulate(network, plan, chunk, model.sample_shape, model.condition(chunk), batch=wish.batch)
        final = run.states[-1]
        if not torch.isfinite(final).all():
            raise AccuQuantError(
                f"seeds {chunk[0]}..{chunk[-1]} end in values that are not finite; check the checkpoint, or choose "
                "another --sampler"
            )
        with torch.no_grad():
            parts.append(to_uint8((final if decoder is None else decoder(final)).numpy()))
        show("sampling fp", first + len(chunk), wish.n, "")
    facts = {
        "checkpoint": path.name,
        "sha256": sha256(path),
        "found": model.found,
        "scheme": "float32",
        "sampler": sampler,
        "steps": steps,
        "calls": len(plan),
        "guidance": guidance,
        "engine": f"torch {torch.__version__}, {wish.device}",
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
