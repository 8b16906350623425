"""Train the bundled reference model: a pixel-space DDPM U-Net on Fashion-MNIST, saved as ermongroup/ddim saves it.

    L = E_{x0, t, eps}  w_t || eps - UNet(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t) ||^2
    w_t = min(clamp(SNR_t, 0.02, 5) / SNR_t, 4)

with SNR_t = abar_t / (1 - abar_t): Ho et al. 2020, eq. 14, weighted. The upper bound is that of Hang et al. 2023: a
short training then spends its gradients on the noise levels that shape the picture. The lower one holds on to the steps
near pure noise, where an error of a percent in the prediction grows along the whole chain; above 4 it only adds
variance to the gradient.

Two files come out. `ckpt.pth` is the repository's five-item training list [model, optimizer, epoch, step, ema], written
atomically every few hundred steps, from which `--resume` goes on. `<name>.ckpt` is the flat EMA state dict that people
pass around, in half precision, with the model's YAML configuration and the facts of the run beside it.

    python tools/train_reference.py --data /usr/share/datasets/fashion-mnist --out build/reference
"""

import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from accuquant.calibrate.families.ddim_unet import UNet, UNetConfig
from accuquant.runtime.console import machine_facts
from torch import Tensor, nn

TIMESTEPS, BETA_START, BETA_END = 1000, 1e-4, 0.02
CONFIG = UNetConfig(
    resolution=28,
    in_channels=1,
    out_ch=1,
    ch=64,
    ch_mult=(1, 1, 2),
    num_res_blocks=1,
    attn_resolutions=(7,),
)


def read_idx_images(folder: Path, split: str) -> Tensor:
    """Fashion-MNIST's idx3 images of `split` ("train" or "t10k"), plain or gzipped, as uint8 (n, 1, H, W)."""
    for name in (f"{split}-images-idx3-ubyte.gz", f"{split}-images-idx3-ubyte"):
        path = folder / name
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            magic, n, height, width = np.frombuffer(raw, ">u4", 4)
            if magic != 2051:
                raise SystemExit(f"{path}: not an idx3 image file (magic {magic}, expected 2051)")
            pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(n, 1, height, width)
            return torch.from_numpy(pixels.copy())
    raise SystemExit(
        f"{folder} holds no {split}-images-idx3-ubyte[.gz]; on Debian: apt-get install dataset-fashion-mnist"
    )


def ddim_yaml(config: UNetConfig) -> dict[str, Any]:
    """The configuration in the repository's own YAML form, which the loader reads."""
    return {
        "data": {"dataset": "FASHION_MNIST", "image_size": config.resolution, "channels": config.in_channels},
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


def save_atomically(value: object, path: Path) -> None:
    part = path.with_suffix(path.suffix + ".part")
    torch.save(value, part)
    os.replace(part, path)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 300 steps, then a cosine to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / 300)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def main(
    data: Annotated[Path, typer.Option(help="Folder with the idx files.")] = Path("/usr/share/datasets/fashion-mnist"),
    out: Annotated[Path, typer.Option(help="Where checkpoints go.")] = Path("build/reference"),
    name: Annotated[str, typer.Option(help="Stem of the released files.")] = "fashion-ddim",
    images: Annotated[int, typer.Option(help="Images to see in all.")] = 360_000,
    batch: Annotated[int, typer.Option()] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of Adam.")] = 1e-3,
    ema_decay: Annotated[float, typer.Option()] = 0.999,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast; slow on CPUs without AVX512-BF16 or AMX.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop (resumably) after this long; 0 for no limit.")] = 0.0,
    save_every: Annotated[int, typer.Option(help="Steps between training checkpoints.")] = 500,
    resume: Annotated[bool, typer.Option(help="Go on from ckpt.pth in the output folder.")] = False,
) -> None:
    """Train until --images have been seen, then release the EMA weights."""
    out.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    threads_used = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    pixels = read_idx_images(data, "train").to(device)
    alpha_bar = torch.cumprod(1 - torch.linspace(BETA_START, BETA_END, TIMESTEPS, dtype=torch.float64), 0)
    signal, noise = (a.sqrt().float().to(device) for a in (alpha_bar, 1 - alpha_bar))

    snr = alpha_bar / (1 - alpha_bar)
    weight = (snr.clamp(0.02, 5.0) / snr).clamp(max=4.0).float().to(device)

    model = UNet(CONFIG).to(device)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device == "cuda")
    steps, step, spent = math.ceil(images / batch), 0, 0.0
    checkpoint = out / "ckpt.pth"
    if resume:
        states = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict({k.removeprefix("module."): v for k, v in states[0].items()})
        optimizer.load_state_dict(states[1])
        step, ema = states[3], states[4]
        spent = json.loads((out / "progress.json").read_text())["seconds"]
        generator.manual_seed(seed + step)

    def loss_of(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x = signal[t, None, None, None] * x0 + noise[t, None, None, None] * eps
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            predicted = model(x, t)
        error = (predicted.float() - eps).square().mean(dim=(1, 2, 3))
        return (weight[t] * error).mean()

    def save() -> None:
        prefixed = {f"module.{k}": v for k, v in model.state_dict().items()}
        save_atomically([prefixed, optimizer.state_dict(), step * batch // len(pixels), step, ema], checkpoint)
        (out / "progress.json").write_text(json.dumps({"seconds": spent + time.monotonic() - begun}))

    begun, first = time.monotonic(), step
    running = torch.zeros((), device=device)
    model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        pick = torch.randint(len(pixels), (batch,), generator=generator, device=device)
        x0 = pixels[pick].float() / 127.5 - 1
        t = torch.randint(TIMESTEPS, (batch,), generator=generator, device=device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        loss = loss_of(x0, t, eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == first:
            # A silent zero here once cost a whole training: a compiled backward that never reached the lower levels.
            dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            if dead:
                raise SystemExit(f"no gradient reaches {', '.join(dead[:5])}: this torch cannot train the model")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        # A short memory at first: a fixed 0.9995 would carry the random start for thousands of steps.
        decay = min(ema_decay, (1 + step) / (10 + step))
        current = model.state_dict()
        torch._foreach_lerp_(list(ema.values()), [current[k] for k in ema], 1 - decay)
        running += loss.detach()
        if step % save_every == 0 or step == steps:
            elapsed = time.monotonic() - begun
            rate = (step - first) * batch / elapsed
            print(
                f"step {step}/{steps}  loss {running.item() / save_every:.4f}  {rate:.0f} images/s  {elapsed:.0f} s",
                flush=True,
            )
            running.zero_()
            save()
            if minutes and elapsed > 60 * minutes and step < steps:
                print(f"time is up; --resume goes on from {checkpoint}")
                return

    save_atomically({k: v.half() for k, v in ema.items()}, out / f"{name}.ckpt")
    (out / f"{name}.yml").write_text(yaml.safe_dump(ddim_yaml(CONFIG), sort_keys=False))
    facts = {
        "images_seen": step * batch,
        "seed": seed,
        "command": f"python tools/train_reference.py --images {images} --batch {batch} --lr {lr:g} --seed {seed}",
        "wall_seconds": round(spent + time.monotonic() - begun),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{machine_facts()['cpu']}, {threads_used}",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "Fashion-MNIST, 60 000 training images, 28x28 grey, MIT licence (Zalando SE)",
    }
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {out / name}.ckpt, .yml and .json")


if __name__ == "__main__":
    typer.run(main)
