"""Train a reference model: a pixel-space DDPM U-Net, saved as ermongroup/ddim saves it.

    L = E_{x0, t, eps}  w_t || eps - UNet(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t) ||^2

`cifar10` is the recipe of that repository's cifar10.yml at full size (35.7 M parameters, for a GPU): w = 1, pairs of
timesteps t and T - 1 - t, pictures mirrored at random, a constant rate. `fashion`, the bundled model, and
`cifar10-small` are trained on a CPU, with

    w_t = min(clamp(SNR_t, 0.02, 5) / SNR_t, 4),   SNR_t = abar_t / (1 - abar_t).

The upper bound is that of Hang et al. 2023: a short training then spends its gradients on the noise levels that shape
the picture. The lower one holds on to the steps near pure noise, where an error of a percent in the prediction grows
along the whole chain; above 4 it only adds variance to the gradient.

Two files come out. `ckpt.pth` is the repository's five-item training list [model, optimizer, epoch, step, ema], written
atomically every few hundred steps, from which `--resume` goes on. `<name>.ckpt` is the flat EMA state dict that people
pass around, in half precision, with the model's YAML configuration and the facts of the run beside it; `--start` begins
another run with it.

    python tools/train_reference.py --data /usr/share/datasets/fashion-mnist --out build/reference
    python tools/train_reference.py --dataset cifar10 --data cifar10/package --device cuda --out build/cifar10
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from accuquant.calibrate.checkpoint import load_weights, read_checkpoint
from accuquant.calibrate.families.ddim_unet import UNet, UNetConfig
from accuquant.runtime.console import command, machine_facts
from accuquant.runtime.errors import AccuQuantError
from picture_sets import Split, read_cifar10, read_idx
from torch import Tensor, nn
from training import Ema, check_gradients, load_training, save_atomically, save_training, warmup_cosine

TIMESTEPS, BETA_START, BETA_END = 1000, 1e-4, 0.02


@dataclass(frozen=True)
class Recipe:
    """A data set, the network for it and how that is trained; what a command line leaves out comes from here.

    `bounded` weighs noise levels by the bounded SNR, under a rate that warms up and falls; otherwise all weigh the
    same, the loss is the sum over a picture's values, and the rate is constant, as in ermongroup/ddim.
    """

    read: Callable[[Path, Split], np.ndarray]
    dataset: str  # its name in the YAML
    told: str
    name: str
    data: Path
    config: UNetConfig
    images: int
    batch: int
    lr: float
    ema: float
    bounded: bool
    mirrored: bool


CIFAR10 = "CIFAR-10, 50 000 training images, 32x32 RGB (Krizhevsky 2009; no formal licence, for research)"
RECIPES: Mapping[str, Recipe] = {
    "fashion": Recipe(
        read=read_idx,
        dataset="FASHION_MNIST",
        told="Fashion-MNIST, 60 000 training images, 28x28 grey, MIT licence (Zalando SE)",
        name="fashion-ddim",
        data=Path("/usr/share/datasets/fashion-mnist"),
        config=UNetConfig(28, 1, 1, ch=64, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(7,)),
        images=360_000,
        batch=64,
        lr=1e-3,
        ema=0.999,
        bounded=True,
        mirrored=False,
    ),
    "cifar10": Recipe(
        read=read_cifar10,
        dataset="CIFAR10",
        told=CIFAR10,
        name="cifar10-ddim",
        data=Path("package"),
        config=UNetConfig(
            32, 3, 3, ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), dropout=0.1
        ),
        images=790_000 * 128,  # where the published checkpoint was taken
        batch=128,
        lr=2e-4,
        ema=0.9999,
        bounded=False,
        mirrored=True,
    ),
    "cifar10-small": Recipe(
        read=read_cifar10,
        dataset="CIFAR10",
        told=CIFAR10,
        name="cifar10-small-ddim",
        data=Path("package"),
        config=UNetConfig(32, 3, 3, ch=64, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(8,)),
        images=2_000_000,
        batch=32,
        lr=6e-4,
        ema=0.999,
        bounded=True,
        mirrored=True,
    ),
}


def ddim_yaml(recipe: Recipe) -> dict[str, Any]:
    """The configuration in the repository's own YAML form, which the loader reads."""
    config = recipe.config
    return {
        "data": {"dataset": recipe.dataset, "image_size": config.resolution, "channels": config.in_channels},
        "model": {
            "type": "simple",
            "in_channels": config.in_channels,
            "out_ch": config.out_ch,
            "ch": config.ch,
            "ch_mult": list(config.ch_mult),
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": list(config.attn_resolutions),
            "dropout": config.dropout,
            "resamp_with_conv": config.resamp_with_conv,
        },
        "diffusion": {
            "beta_schedule": "linear",
            "beta_start": BETA_START,
            "beta_end": BETA_END,
            "num_diffusion_timesteps": TIMESTEPS,
        },
    }


def loss_weights(recipe: Recipe, snr: Tensor) -> Tensor:
    """What a timestep's squared error, the mean over a picture's values, counts: (T,)."""
    if recipe.bounded:
        return (snr.clamp(0.02, 5.0) / snr).clamp(max=4.0)
    config = recipe.config
    return torch.full_like(snr, config.in_channels * config.resolution**2)


def timesteps(recipe: Recipe, batch: int, generator: torch.Generator) -> Tensor:
    """One for every picture, (batch,) long; half of them mirror the other half where the original's do."""
    if recipe.bounded:
        return torch.randint(TIMESTEPS, (batch,), generator=generator, device=generator.device)
    half = torch.randint(TIMESTEPS, (batch // 2 + 1,), generator=generator, device=generator.device)
    return torch.cat([half, TIMESTEPS - 1 - half])[:batch]


def train(
    dataset: Annotated[str, typer.Option(help=f"Of {', '.join(RECIPES)}.")] = "fashion",
    data: Annotated[Path | None, typer.Option(help="Folder of the data set [where its package puts it].")] = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints go.")] = Path("build/reference"),
    name: Annotated[str, typer.Option(help="Stem of the released files [the recipe's].")] = "",
    images: Annotated[int, typer.Option(help="Images to see in all [the recipe's].")] = 0,
    batch: Annotated[int, typer.Option(help="[the recipe's]")] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of Adam [the recipe's].")] = 0.0,
    ema_decay: Annotated[float, typer.Option(help="[the recipe's]")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast; slow on CPUs without AVX512-BF16 or AMX.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop (resumably) after this long; 0 for no limit.")] = 0.0,
    save_every: Annotated[int, typer.Option(help="Steps between training checkpoints.")] = 500,
    start: Annotated[
        Path | None, typer.Option(help="Begin with a released file's weights, under rates from the beginning.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from ckpt.pth in the output folder.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train until --images have been seen, then release the EMA weights."""
    if dataset not in RECIPES:
        raise AccuQuantError(f"--dataset {dataset!r}: there is {', '.join(RECIPES)}")
    recipe = RECIPES[dataset]
    images, batch, lr = images or recipe.images, batch or recipe.batch, lr or recipe.lr
    name = name or recipe.name
    out.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    threads_used = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    stored = recipe.read(data or recipe.data, "train")
    pixels = torch.from_numpy(np.ascontiguousarray(stored.transpose(0, 3, 1, 2))).to(device)
    alpha_bar = torch.cumprod(1 - torch.linspace(BETA_START, BETA_END, TIMESTEPS, dtype=torch.float64), 0)
    signal, noise = (a.sqrt().float().to(device) for a in (alpha_bar, 1 - alpha_bar))
    weight = loss_weights(recipe, alpha_bar / (1 - alpha_bar)).float().to(device)

    model = UNet(recipe.config).to(device)
    before: dict[str, Any] = {}
    if start is not None:
        load_weights(model, read_checkpoint(start), start)
        before = json.loads(start.with_suffix(".json").read_text())
    ema = Ema(model, ema_decay or recipe.ema)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device == "cuda")
    steps, step, spent = math.ceil(images / batch), 0, 0.0
    checkpoint = out / "ckpt.pth"
    if resume:
        step, spent = load_training(checkpoint, model, optimizer, ema)
        generator.manual_seed(seed + step)

    def loss_of(x0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """What is descended, and the plain mean squared error, which losses of all recipes are told in."""
        x = signal[t, None, None, None] * x0 + noise[t, None, None, None] * eps
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            predicted = model(x, t)
        error = (predicted.float() - eps).square().mean(dim=(1, 2, 3))
        return (weight[t] * error).mean(), error.detach().mean()

    begun, first = time.monotonic(), step
    told, counted = torch.zeros((), device=device), 0
    model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, lr) if recipe.bounded else lr
        pick = torch.randint(len(pixels), (batch,), generator=generator, device=device)
        x0 = pixels[pick].float() / 127.5 - 1
        if recipe.mirrored:
            turned = torch.rand((batch, 1, 1, 1), generator=generator, device=device) < 0.5
            x0 = torch.where(turned, x0.flip(3), x0)
        t = timesteps(recipe, batch, generator)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        loss, error = loss_of(x0, t, eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == first:
            check_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        ema.update(step)
        told, counted = told + error, counted + 1
        if step % save_every == 0 or step == steps:
            elapsed = time.monotonic() - begun
            rate = (step - first) * batch / elapsed
            print(
                f"step {step}/{steps}  error {told.item() / counted:.4f}  {rate:.0f} images/s  {elapsed:.0f} s",
                flush=True,
            )
            told, counted = torch.zeros((), device=device), 0
            save_training(checkpoint, model, optimizer, step * batch // len(pixels), step, ema, spent + elapsed)
            if minutes and elapsed > 60 * minutes and step < steps:
                print(f"time is up; --resume goes on from {checkpoint}")
                return

    save_atomically({k: v.half() for k, v in ema.weights.items()}, out / f"{name}.ckpt")
    (out / f"{name}.yml").write_text(yaml.safe_dump(ddim_yaml(recipe), sort_keys=False))
    chosen = ("" if dataset == "fashion" else f"--dataset {dataset} ") + f"--images {images} --batch {batch}"
    chosen += f" --start {start.name}" if start is not None else ""
    facts = {
        "images_seen": step * batch,
        "seed": seed,
        "command": f"python tools/train_reference.py {chosen} --lr {lr:g} --seed {seed}",
        "wall_seconds": round(spent + time.monotonic() - begun),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{machine_facts()['cpu']}, {threads_used}",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": recipe.told,
    } | ({"begun_from": before} if before else {})
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {out / name}.ckpt, .yml and .json")


if __name__ == "__main__":
    command(train)()
