"""Evaluate pictures: of a bundle against its full-precision twin, of a checkpoint, or of a folder.

    pairs (same seeds)    PSNR, SSIM, LPIPS
    two sets              KID and FD on EfficientNet-Lite0; FID and sFID on Inception; to the twin and to real pictures
    a set alone           IS on Inception; CLIP score with the texts it was drawn from

Every number stands with its n, its seeds and its feature network. On few samples FD and KID are far from what endless
samples would give: where a reference is given, what real pictures score against others of them (the floor) is beside.

    python tools/evaluate.py BUNDLE -n 256
    python tools/evaluate.py BUNDLE -n 50000 --reference cifar10/package --split train \\
        --inception pt_inception-2015-12-05-6726825d.pth
    python tools/evaluate.py model.ckpt --reference /usr/share/datasets/fashion-mnist --sampler ddim --steps 50
    python tools/evaluate.py pictures/ --against other-pictures/ --lpips alexnet-owt-7be5be79.pth

Weights are files that are given, nothing is downloaded: --inception as pytorch-fid has them, --lpips torchvision's
AlexNet, --clip a transformers folder with safetensors. EfficientNet-Lite0 comes with `accuquant[evaluate]`. KID and FD
on it are comparable with nothing but themselves; FID is what the literature's is (torch-fidelity, pytorch-fid) only
with the published Inception, its n and its reference.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import efficientnet_lite
import inception
import numpy as np
import torch
import typer
from accuquant.export.facts import versions
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import atomic, write_text
from accuquant.runtime.pictures import grid
from draws import Show, Subject, Wish, of_bundle, of_checkpoint, of_files
from kid import kid
from picture_sets import InceptionMoments, PictureSet, read_reference
from rich.table import Table
from scores import Moments, clip_score, frechet, inception_score, lpips, lpips_network, needed, number, of_pairs

LITE = f"EfficientNet-Lite0, {efficientnet_lite.SIZE} px"
SHEET_ROWS, SHEET_COLUMNS = 8, 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Nets:
    """The networks that pictures are judged by; None where no weights were given."""

    inception: inception.Inception | None
    inception_name: str
    lpips: torch.nn.Module | None
    clip: Path | None


def row(metric: str, of: str, value: float, n: int, to: str | None = None, net: str | None = None, **more: Any) -> Row:
    """One number: what it is, of which pictures and how many, to which, by which network."""
    return {"metric": metric, "of": of, "to": to, "value": value, "n": n, "net": net, **more}


def pair_rows(subject: Subject, nets: Nets, show: Show) -> list[Row]:
    """What the first set's pictures lost against the second's, picture by picture."""
    a, b = subject.sets
    found = of_pairs(a.pixels, b.pixels)
    rows = [
        row("PSNR", a.name, found["psnr_mean"], len(a), b.name, p10=found["psnr_p10"]),
        row("SSIM", a.name, found["ssim_mean"], len(a), b.name),
    ]
    if nets.lpips is not None:
        value = lpips(nets.lpips, a.pixels, b.pixels, progress=lambda d, t: show("LPIPS", d, t, ""))
        rows.append(row("LPIPS", a.name, value, len(a), b.name, "AlexNet, LPIPS 0.1"))
    return rows


def lite_rows(subject: Subject, reference: PictureSet | None, seed: int, show: Show) -> list[Row]:
    """KID and FD to as many real pictures, FD to the twin."""

    def features(pictures: PictureSet) -> np.ndarray:
        pixels = pictures.pixels[..., 0] if pictures.pixels.shape[3] == 1 else pictures.pixels
        return efficientnet_lite.features(pixels, progress=lambda d, t: show(f"Lite0: {pictures.name}", d, t, ""))

    rows: list[Row] = []
    drawn = [(s.name, features(s)) for s in subject.sets]
    moments = [Moments.of(f) for _, f in drawn]
    if len(drawn) == 2:
        rows.append(row("FD", drawn[0][0], frechet(*moments), subject.n, drawn[1][0], LITE, n_to=subject.n))
    if reference is None:
        return rows
    n = min(subject.n, len(reference))
    picked = np.random.default_rng(seed).choice(len(reference), min(2 * n, len(reference)), replace=False)
    real = features(PictureSet(reference.name, reference.pixels[picked]))
    judges, others = real[:n], real[n : 2 * n]
    of_real, floors = Moments.of(judges), dict[str, Row | None]({"KID": None, "FD": None})
    if len(others) == n:
        score = kid(others, judges, seed=seed)
        floors["KID"] = {"value": score.mean, "standard_error": score.standard_error, "n": n, "n_to": n}
        floors["FD"] = {"value": frechet(Moments.of(others), of_real), "n": n, "n_to": n}
    for (name, found), its in zip(drawn, moments, strict=True):
        score = kid(found[:n], judges, seed=seed)
        shared = {"to": reference.name, "net": LITE, "n_to": n}
        rows.append(
            row("KID", name, score.mean, n, standard_error=score.standard_error, subset_size=score.subset_size,
                subsets=score.subsets, floor=floors["KID"], **shared)
        )  # fmt: skip
        rows.append(row("FD", name, frechet(its, of_real), subject.n, floor=floors["FD"], **shared))
    return rows


def inception_rows(
    subject: Subject, reference: PictureSet | InceptionMoments | None, nets: Nets, seed: int, show: Show
) -> list[Row]:
    """IS; FID and sFID to the twin and to all of the reference."""
    network = nets.inception
    assert network is not None

    def features(pictures: PictureSet) -> inception.Features:
        return inception.features(
            network, pictures.pixels, progress=lambda d, t: show(f"Inception: {pictures.name}", d, t, "")
        )

    rows: list[Row] = []
    drawn: list[tuple[str, dict[str, Moments]]] = []
    for pictures in subject.sets:
        found = features(pictures)
        mean, deviation = inception_score(found.logits, seed)
        rows.append(row("IS", pictures.name, mean, subject.n, net=nets.inception_name, deviation=deviation))
        drawn.append((pictures.name, {"FID": Moments.of(found.pooled), "sFID": Moments.of(found.spatial)}))
    real: dict[str, Moments | None] = {"FID": None, "sFID": None}
    floors: dict[str, Row | None] = {"FID": None, "sFID": None}
    if isinstance(reference, InceptionMoments):
        real = {"FID": reference.pooled, "sFID": reference.spatial}
    elif reference is not None:
        found = features(reference)
        for metric, values in (("FID", found.pooled), ("sFID", found.spatial)):
            real[metric] = Moments.of(values)
            if len(values) >= 2 * subject.n:
                order = np.random.default_rng(seed).permutation(len(values))
                held, rest = Moments.of(values[order[: subject.n]]), Moments.of(values[order[subject.n :]])
                floors[metric] = {"value": frechet(held, rest), "n": held.n, "n_to": rest.n}
    for metric in ("FID", "sFID"):
        if len(drawn) == 2:
            (a, of_a), (b, of_b) = drawn
            value = frechet(of_a[metric], of_b[metric])
            rows.append(row(metric, a, value, subject.n, b, nets.inception_name, n_to=subject.n))
        for name, its in drawn:
            judges = real[metric]
            if judges is not None and reference is not None:
                value, n_to = frechet(its[metric], judges), judges.n or None
                told = {"to": reference.name, "net": nets.inception_name, "n_to": n_to, "floor": floors[metric]}
                rows.append(row(metric, name, value, subject.n, **told))
    return rows


def clip_rows(subject: Subject, folder: Path, show: Show) -> list[Row]:
    assert subject.texts is not None
    texts = subject.texts

    def score(pictures: PictureSet) -> float:
        return clip_score(pictures.pixels, texts, folder, progress=lambda d, t: show("CLIP", d, t, ""))

    return [row("CLIP score", s.name, score(s), subject.n, net=folder.name) for s in subject.sets]


def judge(
    subject: Subject, reference: PictureSet | InceptionMoments | None, nets: Nets, seed: int, show: Show
) -> tuple[list[Row], dict[str, str]]:
    """All rows that can be had, and why others cannot."""
    rows = pair_rows(subject, nets, show) if len(subject.sets) == 2 else []
    left_out: dict[str, str] = {}
    if len(subject.sets) == 2 or isinstance(reference, PictureSet):
        try:
            rows += lite_rows(subject, reference if isinstance(reference, PictureSet) else None, seed, show)
        except AccuQuantError as error:
            left_out["KID, FD"] = str(error)
    if nets.inception is not None:
        rows += inception_rows(subject, reference, nets, seed, show)
    if nets.clip is not None:
        rows += clip_rows(subject, nets.clip, show)
    return rows, left_out


def networks(weights: Path | None, backbone: Path | None, clip: Path | None, device: str) -> Nets:
    """Networks of the weights given, and their libraries, before minutes of sampling."""
    if weights is not None:
        needed("torchmetrics.image.inception", "evaluate")
    if clip is not None:
        needed("transformers", "perceptual")
    return Nets(
        inception.load(weights, device) if weights else None,
        inception.describe(weights) if weights else "",
        lpips_network(backbone, device) if backbone else None,
        clip,
    )


def table(title: str, rows: list[Row]) -> Table:
    made = Table(title=title)
    for column in ("", "of", "to", "value", "n", "floor", "by"):
        made.add_column(column, justify="right" if column in ("value", "n", "floor") else "left")
    for r in rows:
        counts = str(r["n"]) + (f" / {r['n_to']}" if r.get("n_to") else "")
        floor = r.get("floor")
        spoken = f"{number(r['metric'], floor)} ({floor['n']} / {floor['n_to']})" if floor else "-"
        made.add_row(r["metric"], r["of"], r["to"] or "-", number(r["metric"], r), counts, spoken, r["net"] or "-")
    return made


def evaluate(
    what: Annotated[Path, typer.Argument(help="A bundle, a checkpoint, a folder of pictures, a .npz or .npy.")],
    reference: Annotated[Path | None, typer.Option(help="Real pictures, or moments of them (.npz).")] = None,
    split: Annotated[str, typer.Option(help="train or test, of datasets that have both.")] = "test",
    against: Annotated[Path | None, typer.Option(help="Of a folder: the pictures its own are paired with.")] = None,
    n: Annotated[int, typer.Option("-n", "--number", min=4, help="How many are drawn.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; the next ones count up.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="Of a bundle: another plan.json.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Of a checkpoint: as the exporter knows it.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a checkpoint.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance [the model's].")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, a line a picture, taken in turn.")] = None,
    twin: Annotated[bool, typer.Option(help="Of a bundle: draw from the full-precision twin too.")] = True,
    inception_file: Annotated[Path | None, typer.Option("--inception", help=f"{inception.PUBLISHED}.")] = None,
    lpips_file: Annotated[Path | None, typer.Option("--lpips", help="alexnet-owt-7be5be79.pth.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A transformers folder of CLIP.")] = None,
    config: Annotated[Path | None, typer.Option(help="Of a checkpoint, as for the exporter.")] = None,
    engine: Annotated[str, typer.Option(help="Of a bundle.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Drawn at a time.")] = 16,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all; of a worker of Ray, one.")] = 0,
    ray: Annotated[
        int, typer.Option(min=0, help="Draw on so many workers of Ray, here or on the cluster that RAY_ADDRESS names.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Of torch: cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON of the numbers.")] = Path("build/evaluation.json"),
    sheet: Annotated[Path | None, typer.Option(help="A .png of the first 128 pictures.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Draw or read pictures, judge them, and print and write every number with its n, seeds and network."""
    if threads:
        torch.set_num_threads(threads)
    if split not in ("train", "test"):
        raise AccuQuantError(f"--split {split!r}: a dataset has train and test")
    begun = time.perf_counter()
    # Whatever can be refused is refused before the minutes of sampling.
    nets = networks(inception_file, lpips_file, clip, device)
    real = read_reference(reference, split) if reference else None  # type: ignore[arg-type]
    lines = prompts.read_text().splitlines() if prompts else None
    is_bundle, is_file = (what / "manifest.json").exists(), what.is_file() and what.suffix not in (".npz", ".npy")
    drawn = is_bundle or is_file
    texts = [lines[i % len(lines)] for i in range(n)] if lines and drawn else lines
    wish = Wish(n, seed, steps, sampler, plan, guidance, texts, engine, batch, threads, device, ray)
    if against is not None and drawn:
        raise AccuQuantError("--against pairs pictures of folders; a bundle is paired with its own twin")
    if ray and not drawn:
        raise AccuQuantError(f"--ray draws pictures of a bundle or a checkpoint; those of {what} are there already")
    with bar() as show:
        if is_bundle:
            subject = of_bundle(what, wish, twin, show)
        elif is_file:
            subject = of_checkpoint(what, config, wish, show)
        else:
            subject = of_files(what, against, split, texts)  # type: ignore[arg-type]
        sampled = time.perf_counter()
        check(subject, real, nets, what)
        rows, left_out = judge(subject, real, nets, seed, show)
    if sheet is not None:
        with atomic(sheet) as part:
            grid(subject.sets[0].pixels[: SHEET_ROWS * SHEET_COLUMNS], columns=SHEET_COLUMNS).save(part, format="PNG")
    seeds = subject.seeds and [subject.seeds[0], subject.seeds[-1]]
    report = {
        "schema_version": 1,
        "subject": subject.facts,
        "reference": real and {"name": real.name, "n": len(real) if isinstance(real, PictureSet) else None},
        "n": subject.n,
        "seeds": seeds,
        "rows": rows,
        "left_out": left_out,
        "seconds": {"sampling": round(sampled - begun, 1), "total": round(time.perf_counter() - begun, 1)},
        "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    drawn_from = f"seeds {seeds[0]}..{seeds[1]}" if seeds else "from disk"
    console.print(table(f"{what.name}, {subject.n} pictures, {drawn_from}", rows))
    for metrics, why in left_out.items():
        console.print(f"left out: {metrics}: {why}")
    console.print(f"wrote {out}" + (f" and {sheet}" if sheet else ""))


def check(subject: Subject, reference: PictureSet | InceptionMoments | None, nets: Nets, what: Path) -> None:
    """Raises AccuQuantError where a comparison would mean nothing."""
    shape = subject.sets[0].pixels.shape[1:]
    if isinstance(reference, PictureSet) and reference.pixels.shape[1:] != shape:
        raise AccuQuantError(
            f"{what} has pictures of {shape} and {reference.name} of {reference.pixels.shape[1:]} (height, width, "
            "channels); name the data that the model was trained on"
        )
    if nets.clip is not None and subject.texts is None:
        raise AccuQuantError("--clip scores pictures with their texts, and there are none; give them with --prompts")


if __name__ == "__main__":
    command(evaluate)()
