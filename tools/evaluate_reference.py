"""How good a checkpoint's full-precision samples are: KID against held-out pictures, and a sheet to look at.

    floor = KID(train, test)   <=   KID(samples, test)

The floor is what real pictures score against as many other real pictures: 0 is expected there, and how far
the floor misses it shows how far to trust the rest. Samples depend on their seeds alone, so a run repeats.

Two files come out: `samples.png`, the first 128 pictures; `kid.json`, the numbers and what they depend on.

    python tools/evaluate_reference.py --checkpoint build/reference/fashion-ddim.ckpt --out build/reference
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accuquant.calibrate.families import load_model
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import Progress, simulate
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import atomic, sha256, write_text
from accuquant.runtime.pictures import grid, to_uint8
from accuquant.runtime.plan import SamplingPlan
from efficientnet_lite import features, weights_path
from kid import Kid, kid
from train_reference import read_idx_images

METRIC = "KID (EfficientNet-Lite0, 96 px)"
SHEET_ROWS, SHEET_COLUMNS = 8, 16


def draw(
    network: torch.nn.Module,
    plan: SamplingPlan,
    seeds: range,
    shape: tuple[int, int, int],
    batch: int,
    progress: Progress,
) -> np.ndarray:
    """The pictures of `seeds` as uint8 (N, H, W, C).

    Raises:
        AccuQuantError: values that are not finite.
    """
    pictures: list[np.ndarray] = []
    # One `simulate` per batch, to keep its end alone: the trajectories of thousands of seeds fill gigabytes.
    for first in range(0, len(seeds), batch):
        chunk = seeds[first : first + batch]

        def on_step(done: int, total: int, first: int = first, size: int = len(chunk)) -> None:
            progress(first + size * done // total, len(seeds))

        final = simulate(network, plan, chunk, shape, batch=batch, progress=on_step).states[-1]
        if not torch.isfinite(final).all():
            raise AccuQuantError(
                f"seeds {chunk[0]}..{chunk[-1]} end in values that are not finite; check the checkpoint, "
                "or choose another --sampler"
            )
        pictures.append(to_uint8(final.numpy()))
    return np.concatenate(pictures)


def real_pictures(data: Path, split: str, n: int, seed: int) -> np.ndarray:
    """`n` pictures of a split, picked at random without replacement, as uint8 (n, H, W).

    Raises:
        AccuQuantError: the split has fewer.
    """
    stored = read_idx_images(data, split)[:, 0].numpy()
    if n > len(stored):
        raise AccuQuantError(f"-n {n}: the {split} split in {data} has {len(stored)} pictures; ask for no more")
    return stored[np.random.default_rng(seed).choice(len(stored), n, replace=False)]


def rounded(score: Kid) -> dict[str, float]:
    return {"kid": round(score.mean, 6), "standard_error": round(score.standard_error, 6)}


def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint that the exporter reads.")],
    data: Annotated[Path, typer.Option(help="Folder with the idx files, both splits.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    n: Annotated[int, typer.Option("-n", "--number", min=4, help="Samples, and pictures of each split.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 50,
    sampler: Annotated[str, typer.Option(help="A sampler's name, as the exporter knows it.")] = "ddim",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample; the next ones count up.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for samples.png and kid.json.")] = Path("build/reference"),
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Sample from a checkpoint in full precision and score the pictures against the test split."""
    if threads:
        torch.set_num_threads(threads)
    # Whatever can be refused is refused before the minutes of sampling.
    weights_path()
    model = load_model(checkpoint)
    plan = trace(sampler, model.noise_schedule, steps)
    test, train = (real_pictures(data, split, n, seed) for split in ("t10k", "train"))
    if model.sample_shape != (1, *test.shape[1:]):
        raise AccuQuantError(
            f"{checkpoint} makes pictures of {model.sample_shape} and {data} holds {(1, *test.shape[1:])}; "
            "name the data that the model was trained on with --data"
        )
    console.print(model.found)
    begun = time.perf_counter()
    with bar() as show:

        def stage(name: str) -> Progress:
            return lambda done, total: show(name, done, total, "")

        seeds = range(seed, seed + n)
        samples = draw(model.network, plan, seeds, model.sample_shape, batch, stage("sampling"))
        sampled = time.perf_counter()
        with atomic(out / "samples.png") as part:
            grid(samples[: SHEET_ROWS * SHEET_COLUMNS], columns=SHEET_COLUMNS).save(part, format="PNG")
        of_test, of_train, of_samples = (
            features(images, progress=stage(f"features of {name}"))
            for name, images in (("test", test), ("train", train), ("samples", samples[..., 0]))
        )
    score, floor = (kid(found, of_test, seed=seed) for found in (of_samples, of_train))
    ended = time.perf_counter()
    facts = {
        "metric": METRIC,
        **rounded(score),
        "of": "samples against test split, n pictures each",
        "subset_size": score.subset_size,
        "subsets": score.subsets,
        "n": n,
        "floor": {**rounded(floor), "of": "training split against test split, n pictures each"},
        "checkpoint": {"name": checkpoint.name, "sha256": sha256(checkpoint), "found": model.found},
        "precision": "float32",
        "sampler": sampler,
        "steps": steps,
        "seed": seed,
        "seconds": {"sampling": round(sampled - begun, 1), "total": round(ended - begun, 1)},
        "machine": {**machine_facts(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    write_text(out / "kid.json", json.dumps(facts, indent=2) + "\n")
    console.print(f"{METRIC}, {n} samples, {sampler} {steps}: {score}; floor {floor}")
    console.print(f"wrote samples.png and kid.json in {out}")


if __name__ == "__main__":
    command(evaluate)()
