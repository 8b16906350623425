"""Does a quantized text-to-image bundle paint the same pictures, and what it was asked for?

Of n captions that were not calibrated with, one picture each, by the full-precision twin and by every bundle:

    fidelity   PSNR and SSIM to the twin's picture
    caption    all captions are ordered by how close a real picture of theirs comes to the painted one (cosine of
               EfficientNet-Lite0's features about the real pictures' mean); counted is the place of the one asked for

The same count for the real pictures of one style against those of the others says what such an order can tell at all;
chance is one in as many as there are captions. No text network takes part, so it is no CLIP score and compares with
none.

Out come emoji.json, and a sheet of the same prompts and seeds by every side.

    python tools/evaluate_emoji.py emoji-w8a8 emoji-w4a8 --data . --out tools/results
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import emoji
import numpy as np
import typer
from accuquant.runtime.bundle import Bundle, ByText, NetworkName
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.fidelity import psnr, ssim
from accuquant.runtime.files import atomic, write_text
from accuquant.runtime.inspection import operator_precisions
from accuquant.runtime.pictures import grid
from accuquant.runtime.pipeline import Pipeline
from efficientnet_lite import features

SHEET = (
    "red apple", "smiling face with sunglasses", "blue heart", "red heart", "strawberry", "slice of pizza",
    "grinning face", "sunflower", "rocket", "panda", "green apple", "yellow heart", "four leaf clover", "fried egg",
    "soccer ball", "crescent moon",
)  # fmt: skip


def places(painted: np.ndarray, real: np.ndarray, captions: list[str], wanted: list[str]) -> np.ndarray:
    """The place, from 1, of every painted picture's caption among all: features (n, d) and (m, d) to int (n,)."""
    mean = real.mean(axis=0)
    a, b = (x - mean for x in (painted, real))
    close = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    names = sorted(set(captions))
    column = {name: i for i, name in enumerate(names)}
    best = np.full((len(painted), len(names)), -np.inf, np.float32)
    for j, caption in enumerate(captions):
        best[:, column[caption]] = np.maximum(best[:, column[caption]], close[:, j])
    own = best[np.arange(len(wanted)), [column[name] for name in wanted]]
    return 1 + (best > own[:, None]).sum(axis=1)


def counted(found: np.ndarray) -> dict[str, float]:
    return {
        "first": round(float((found == 1).mean()), 4),
        "first_ten": round(float((found <= 10).mean()), 4),
        "median": float(np.median(found)),
    }


def among_real(known: np.ndarray, captions: list[str], styles: list[str]) -> dict[str, float]:
    """The same count for real pictures: those of the first style, ordered by those of the others."""
    asked = [i for i, style in enumerate(styles) if style == styles[0]]
    others = [i for i, style in enumerate(styles) if style != styles[0]]
    held = {captions[i] for i in others}
    asked = [i for i in asked if captions[i] in held]
    found = places(known[asked], known[others], [captions[i] for i in others], [captions[i] for i in asked])
    return {**counted(found), "n": len(asked)}


def paint(
    bundle: Bundle, network: NetworkName, prompts: list[str], show: Any, name: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Pictures of seeds 0..n-1 under the prompts; and the engine that painted them, with its operators by precision."""
    with Pipeline(bundle, network=network) as pipeline:
        steps = len(pipeline.plan)
        latents = pipeline.generate(
            range(len(prompts)),
            lambda first, done, _: show(
                f"painting, {name}", first * steps + done * pipeline.batch, len(prompts) * steps, ""
            ),
            prompts=prompts,
        )
        ran = Counter(operator_precisions(pipeline.engine, bundle.manifest.operators).values())
        kept = Counter(pipeline.engine.kept_in_float.values())
        return pipeline.pictures(latents), {"engine": pipeline.engine.name, "operators": ran, "kept_in_float": kept}


def evaluate(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles of one text-to-image checkpoint.")],
    data: Annotated[Path, typer.Option(help="Folder with the packed icon sets.")] = Path("."),
    n: Annotated[int, typer.Option("-n", "--number", min=2, help="Captions, one picture each.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Which captions.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for emoji.json and the sheets.")] = Path("build/emoji"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Hold quantized text-to-image bundles against their twin, and their pictures against what was asked for."""
    opened = [Bundle(folder) for folder in bundles]
    first = opened[0]
    known = first.manifest.conditioning
    if not isinstance(known, ByText):
        raise AccuQuantError(f"{first.folder} takes no prompts; a bundle of a text-to-image model is expected")
    if len({bundle.manifest.networks["twin"].files["twin.onnx"] for bundle in opened}) > 1:
        raise AccuQuantError("the bundles have other twins: export them from one checkpoint, for one plan")
    pictures, captions, styles = emoji.load(data, 64)
    fresh = sorted(set(captions) - set(known.examples))
    wanted = [fresh[i] for i in np.random.default_rng(seed).permutation(len(fresh))[:n]]
    sides: list[tuple[str, Bundle, NetworkName]] = [("fp32", first, "twin")]
    sides += [(bundle.manifest.scheme, bundle, "denoiser") for bundle in opened]
    rows: dict[str, Any] = {}
    painted: dict[str, np.ndarray] = {}
    with bar() as show:
        real = features(pictures.transpose(0, 2, 3, 1), progress=lambda done, total: show("features", done, total, ""))
        for name, bundle, network in sides:
            made, ran = paint(bundle, network, [*SHEET, *wanted], show, name)
            with atomic(out / f"emoji-{name.lower()}.png") as part:
                grid(made[: len(SHEET)], columns=8).save(part, format="PNG")
            painted[name] = made[len(SHEET) :]
            rows[name] = {
                **ran,
                "bytes": bundle.weight_bytes(network),
                "caption": counted(places(features(painted[name]), real, captions, wanted)),
            }
            if network == "denoiser":
                fp, own = painted["fp32"], painted[name]
                found = psnr(fp, own)
                rows[name] |= {
                    "iterations": bundle.manifest.provenance["calibration"]["iterations"],
                    "psnr_mean": round(float(found.mean()), 3),
                    "psnr_p10": round(float(np.quantile(found, 0.1)), 3),
                    "ssim_mean": round(float(ssim(fp, own).mean()), 5),
                }
    facts = {
        "n": len(wanted),
        "captions": len(set(captions)),
        "seed": seed,
        "guidance": known.guidance,
        "sampler": first.manifest.sampler,
        "steps": len(first.plan),
        "features": "EfficientNet-Lite0, 96 px",
        "sheet": SHEET,
        "real": among_real(real, captions, styles),
        "sides": rows,
        "machine": machine_facts(),
    }
    write_text(out / "emoji.json", json.dumps(facts, indent=2) + "\n")
    for name, row in rows.items():
        told = f"{row['psnr_mean']:.2f} dB, SSIM {row['ssim_mean']:.4f}; " if "psnr_mean" in row else ""
        of = row["caption"]
        console.print(f"{name:6} {told}caption first {of['first']:.1%}, among ten {of['first_ten']:.1%}")
    console.print(f"n = {len(wanted)} captions of {len(set(captions))}; wrote emoji.json and sheets in {out}")


if __name__ == "__main__":
    command(evaluate)()
