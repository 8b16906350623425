"""The cards of the bundled models, from the facts that their trainings and measurements left behind."""

import json
from pathlib import Path


def fashion_card(folder: Path) -> str:
    """Of the pixel-space model; `folder` holds its facts."""
    facts = json.loads((folder / "fashion-ddim.json").read_text())
    quality = json.loads((folder / "evaluation.json").read_text())
    kid = next(row for row in quality["rows"] if row["metric"] == "KID")
    floor, drawn = kid["floor"], quality["subject"]
    return f"""# fashion-ddim

A pixel-space DDPM U-Net, {facts["parameters"] / 1e6:.2f} M parameters, 28x28 grey, in the layout of ermongroup/ddim:
the model that AccuQuant's demo and tests quantize. `fashion-ddim.ckpt` is the flat EMA state dict in half precision,
`fashion-ddim.yml` its configuration.

| | |
|---|---|
| data | {facts["data"]} |
| images seen | {facts["images_seen"]:,} |
| objective | noise prediction, linear betas 1e-4..0.02, 1000 timesteps, bfloat16 autocast |
| weighting | SNR clamped between 0.02 and 5, no weight above 4 |
| seed | {facts["seed"]} |
| command | `{facts["command"]}` |
| wall time | {facts["wall_seconds"] / 60:.0f} min on {facts["device"]} |
| KID ({kid["net"]}) | {score(kid)}, n = {kid["n"]} samples against as many of {kid["to"]} |
| its floor | {score(floor)}, {floor.get("of", "real pictures against others of them")}, n = {floor["n"]} |
| sampler | {drawn["sampler"]}, {drawn["steps"]} steps, seeds from {quality["seeds"][0]} |

KID is measured on features of an ImageNet EfficientNet-Lite0 and is comparable with nothing but itself.

![samples](samples.png)

Intended use: a small real model to calibrate, export and test with. It draws garments and nothing else.
"""


def cifar_card(folder: Path, results: Path) -> str:
    """Of the small pixel-space model of CIFAR-10; its numbers lie in `results`."""
    facts = json.loads((folder / "cifar10-small-ddim.json").read_text())
    measured = json.loads((results / "cifar10-w8a8.json").read_text())
    kid = next(row for row in measured["rows"] if row["metric"] == "KID" and row["of"] == "fp")
    subject = measured["subject"]
    return f"""# cifar10-small-ddim

A pixel-space DDPM U-Net, {facts["parameters"] / 1e6:.2f} M parameters, 32x32 RGB, in the layout of ermongroup/ddim:
the paper's first benchmark at the size that a CPU trains. `cifar10-small-ddim.ckpt` is the flat EMA state dict in half
precision, `cifar10-small-ddim.yml` its configuration.

| | |
|---|---|
| data | {facts["data"]} |
| images seen | {facts["images_seen"]:,}; the published model saw 101,120,000 |
| objective | noise prediction, linear betas 1e-4..0.02, 1000 timesteps, bfloat16 autocast |
| weighting | SNR clamped between 0.02 and 5, no weight above 4 |
| seed | {facts["seed"]} |
| command | `{facts["command"]}` |
| wall time | {facts["wall_seconds"] / 60:.0f} min on {facts["device"]}, beside other work |
| note | {facts.get("note", "-")} |
| KID ({kid["net"]}) | {score(kid)}, n = {kid["n"]} samples against as many of {kid["to"]} |
| its floor | {score(kid["floor"])}, real pictures against others of them, n = {kid["floor"]["n"]} |
| sampler | {subject["sampler"]}, {subject["calls"]} calls, seeds from {measured["seeds"][0]} |

![samples](../results/cifar10-w8a8.png)

The pictures above are of the W8A8 bundle. Intended use: running CIFAR-10's commands (CIFAR10.md) from end to end. It is
far from trained: colours and layouts are there, objects are not. `tools/train_reference.py --start` goes on from it.
"""


def score(kid: dict[str, float]) -> str:
    return f"{kid['value'] * 1e3:.1f} ± {kid['standard_error'] * 1e3:.1f} (x 1000)"


def emoji_card(folder: Path, results: Path) -> str:
    """Of the latent text-to-image model; its pictures and numbers lie in `results`."""
    facts = json.loads((folder / "emoji-ldm.json").read_text())
    size = {name: f"{count / 1e6:.2f} M" for name, count in facts["parameters"].items()}
    seconds = facts["seconds"]
    return f"""# emoji-ldm

Latent text-to-image diffusion of emoji, 64x64, in CompVis's layout: a denoiser with cross-attention
({size["denoiser"]} parameters, latents 4x16x16), a text encoder trained with it ({size["text_encoder"]}) and a KL
autoencoder of factor 4 ({size["autoencoder"]}). `emoji-ldm.ckpt` is the averaged weights in half precision;
`emoji-ldm.tokenizer.json` and `emoji-ldm.yml` belong to it.

| | |
|---|---|
| data | {facts["pictures"]} drawings with their names: {"; ".join(facts["data"])} |
| seen | {facts["autoencoder_images_seen"]:,} pictures, most of them quarters, and {facts["latents_seen"]:,} latents |
| objective | v-prediction, betas linear in their root, 1000 timesteps; a tenth of the captions is empty |
| commands | {", then ".join(f"`{command}`" for command in facts["commands"])} |
| wall time | {seconds["autoencoder"] / 60:.0f} and {seconds["denoiser"] / 60:.0f} min on {facts["device"]} |
| note | {facts.get("note", "-")} |

A caption may end in `, noto` or `, flat`, which asks for a style.
{_recalled(results)}
Intended use: a small real model to calibrate, export and play with. It knows the names of emoji, without people and
flags, and no other words. Most of the prompts above are recognisable, drawings with many parts (the pizza) are not;
`tools/train_emoji.py --start` goes on from it.
"""


def _recalled(results: Path) -> str:
    """How many of its pictures are found by their captions, if that was measured."""
    if not (results / "emoji.json").exists():
        return ""
    measured = json.loads((results / "emoji.json").read_text())
    real, of = measured["real"], measured["sides"]["fp32"]["caption"]
    return f"""
Of {measured["n"]} painted pictures the caption is found first for {of["first"]:.1%} and among the first ten for
{of["first_ten"]:.1%} (of {real["n"]} real ones {real["first"]:.1%} and {real["first_ten"]:.1%}). Captions are those of
training: the count says how well pictures are recalled, not how well new ones are invented.

![pictures in full precision](../results/emoji-fp32.png)

Under {", ".join(measured["sheet"])}.
"""
