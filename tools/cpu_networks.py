"""Four networks of different make, as bundles: what a CPU is measured on.

Two are the reference models; two have their layouts' real configurations and the random weights that torch begins a
training with, since no trained ones are free to be had. A checkpoint goes through accuquant-export as a user's would;
ranges are searched and nothing is learned, so that ours and the peers' have seen the same kind of data.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.families.ddim_unet import UNet, UNetConfig
from accuquant.calibrate.families.dit_net import DiT, DitConfig
from accuquant.export.graph import save_graph, trace_float
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.errors import AccuQuantError
from torch import nn

REFERENCE = Path(__file__).parent / "reference"
QUICK = ("--steps", "10", "--set", "compensate=never")  # random weights have nothing that compensation could keep
RANGES_ONLY = ("--preset", "smoke", "--set", "iterations=0", "--pictures", "4")


def _ddpm(folder: Path) -> Path:
    config = UNetConfig(32, 3, 3, ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,))
    return _random(lambda: UNet(config), folder / "ddpm-cifar10.ckpt")


def _dit(folder: Path) -> Path:
    config = DitConfig(32, 2, 4, width=384, depth=7, heads=6, hidden=1536, classes=1000)
    return _random(lambda: DiT(config), folder / "dit.pt")


def _random(make: Callable[[], nn.Module], path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(make().state_dict(), path)
    return path


@dataclass(frozen=True)
class Network:
    """What it is, how its checkpoint is had, and how it is exported."""

    told: str
    checkpoint: Callable[[Path], Path]
    options: tuple[str, ...] = ("--steps", "50")


NETWORKS: Mapping[str, Network] = {
    "ddpm": Network("DDPM's U-Net for CIFAR-10, random weights", _ddpm, QUICK),
    "dit": Network("DiT, width 384, depth 7, 256 tokens, random weights", _dit, QUICK),
    "small": Network("the bundled U-Net", lambda folder: REFERENCE / "fashion-ddim.ckpt"),
    "conditional": Network("the emoji U-Net, with cross-attention", lambda folder: REFERENCE / "emoji-ldm.ckpt"),
}


def bundle_of(name: str, bits: str, folder: Path) -> Bundle:
    """The network's bundle in `folder`, exported if it is not there yet.

    Raises:
        AccuQuantError: the export failed; with its last words.
    """
    out = folder / f"{name}-{bits.replace('/', 'a')}"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = NETWORKS[name].checkpoint(folder)
        export = Path(sys.executable).with_name("accuquant-export")
        asked = [export, checkpoint, "--bits", bits, "--out", out, *NETWORKS[name].options, *RANGES_ONLY]
        child = subprocess.run(asked, capture_output=True, text=True, check=False)
        if child.returncode:
            raise AccuQuantError(f"{name}: accuquant-export failed: {(child.stderr or child.stdout).strip()[-400:]}")
    return Bundle(out)


def plain_graph(name: str, folder: Path) -> Path:
    """The network's float graph in `folder` as torch writes it, without our rewrites: what others' users begin with."""
    out = folder / f"{name}-plain.onnx"
    if not out.exists():
        model = load_model(NETWORKS[name].checkpoint(folder))
        save_graph(trace_float(model.network, {}, model.sample_shape, model.condition([0])), out)
    return out
