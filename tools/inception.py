"""Features of the Inception network that FID is defined on, from its weights in a file.

    u = (resize_299(p) - 128) / 128
    pooled  = mean_{h,w} Mixed_7c(...)            2048, of FID
    spatial = Mixed_6d(...), channels 0..6        17 x 17 x 7 = 2023, of sFID
    logits  = W pooled                            1008, without their bias, of the Inception score

Szegedy et al., "Rethinking the Inception architecture", 2016, as TensorFlow's graph of 2015-12-05 has it: average
pooling leaves padding out of the mean, the last block pools by maximum, and pictures are resized bilinearly with their
corners as origin. Salimans et al., 2016 (IS); Heusel et al., 2017 (FID); Nash et al., 2021 (sFID, in the reading of
OpenAI's guided-diffusion evaluator).

The layout is that of `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid and torch-fidelity both read; parameter
names are kept, so that loading is a strict `load_state_dict`. The network is here because theirs execute pickles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accuquant.calibrate.checkpoint import load_weights, read_checkpoint
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import sha256
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # done, total

PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
STANDARD = "6726825d"  # how its digest begins
SIZE, POOLED, SPATIAL, LOGITS = 299, 2048, 7, 1008


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU; `same` keeps the size, otherwise nothing is padded."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


# A convolution of a branch: its name, channels, kernel. A tuple of two at a branch's end reads the same input twice.
Conv = tuple[str, int, tuple[int, int]]
Branch = Sequence[Conv | tuple[Conv, Conv]]
ONE, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


class Block(nn.Module):
    """Branches side by side on channels, the last of them pooling; `halves` has every branch end with stride 2."""

    def __init__(self, inputs: int, branches: Sequence[Branch], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.order: list[list[tuple[str, ...]]] = []
        for branch in branches:
            channels, names = inputs, []
            for index, step in enumerate(branch):
                convs = [step] if isinstance(step[0], str) else list(step)
                ends = pool == "halves" and index == len(branch) - 1
                for name, outputs, kernel in convs:  # type: ignore[misc]
                    setattr(self, name, ConvNorm(channels, outputs, kernel, 2 if ends else 1, same=not ends))
                channels = convs[0][1]  # type: ignore[assignment]
                names.append(tuple(conv[0] for conv in convs))
            self.order.append(names)  # type: ignore[arg-type]
        if pooled:
            self.branch_pool = ConvNorm(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.order:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self.pool == "halves":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "maximum":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def block_a(inputs: int, pooled: int) -> Block:
    return Block(
        inputs,
        [
            [("branch1x1", 64, ONE)],
            [("branch5x5_1", 48, ONE), ("branch5x5_2", 64, FIVE)],
            [("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE)],
        ],
        "average",
        pooled,
    )


def block_c(c: int) -> Block:
    return Block(
        768,
        [
            [("branch1x1", 192, ONE)],
            [("branch7x7_1", c, ONE), ("branch7x7_2", c, WIDE), ("branch7x7_3", 192, TALL)],
            [
                ("branch7x7dbl_1", c, ONE), ("branch7x7dbl_2", c, TALL), ("branch7x7dbl_3", c, WIDE),
                ("branch7x7dbl_4", c, TALL), ("branch7x7dbl_5", 192, WIDE),
            ],
        ],
        "average",
        192,
    )  # fmt: skip


def block_e(inputs: int, pool: str) -> Block:
    def fork(name: str) -> tuple[Conv, Conv]:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    return Block(
        inputs,
        [
            [("branch1x1", 320, ONE)],
            [("branch3x3_1", 384, ONE), fork("branch3x3_2")],
            [("branch3x3dbl_1", 448, ONE), ("branch3x3dbl_2", 384, THREE), fork("branch3x3dbl_3")],
        ],
        pool,
        192,
    )


@dataclass(frozen=True)
class Features:
    """Of N pictures, float32: pooled (N, 2048), spatial (N, 2023), logits (N, 1008)."""

    pooled: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


class Inception(nn.Module):
    """Pixels (B, 3, H, W), float32, 0..255, to the three tensors of `Features`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, THREE, 2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, THREE, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, THREE)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, THREE, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Block(
            288,
            [
                [("branch3x3", 384, THREE)],
                [("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE), ("branch3x3dbl_3", 96, THREE)],
            ],
            "halves",
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (block_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Block(
            768,
            [
                [("branch3x3_1", 192, ONE), ("branch3x3_2", 320, THREE)],
                [
                    ("branch7x7x3_1", 192, ONE), ("branch7x7x3_2", 192, WIDE), ("branch7x7x3_3", 192, TALL),
                    ("branch7x7x3_4", 192, THREE),
                ],
            ],
            "halves",
        )  # fmt: skip
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(POOLED, "maximum")
        self.fc = nn.Linear(POOLED, LOGITS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize(x) - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order, as in published moments
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


def resize(x: Tensor) -> Tensor:
    """Bilinear to 299 x 299 with output i at i * size / 299 of the input, as TensorFlow 1 does."""
    rows, columns = (_interpolation(size).to(x) for size in x.shape[2:])
    return rows @ x @ columns.T


def _interpolation(size: int) -> Tensor:
    """The (299, size) matrix whose rows weigh two neighbours each."""
    at = torch.arange(SIZE, dtype=torch.float32) * (size / SIZE)
    low = at.long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = (at - low).unsqueeze(1)
    unit = torch.eye(size)
    return unit[low] * (1 - share) + unit[high] * share


def describe(weights: Path) -> str:
    """The network's name for tables: with the published weights, or with which others."""
    digest = sha256(weights)[: len(STANDARD)]
    return "Inception 2015-12-05" if digest == STANDARD else f"Inception of other weights ({digest}), not FID's"


def load(weights: Path, device: str = "cpu") -> Inception:
    """The network in evaluation mode.

    Raises:
        AccuQuantError: the file cannot be read, or holds another network; no pickle is executed.
    """
    stored = read_checkpoint(weights)
    network = Inception()
    if not isinstance(stored, Mapping) or "Mixed_7c.branch1x1.conv.weight" not in stored:
        raise AccuQuantError(f"{weights} is not FID's Inception; {PUBLISHED}, which pytorch-fid reads, is expected")
    load_weights(network, stored, weights)
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def features(network: Inception, images: np.ndarray, *, batch: int = 50, progress: Progress | None = None) -> Features:
    """Features of uint8 pictures (N, H, W, 1 or 3); grey is shown as RGB."""
    device = network.fc.weight.device
    parts: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(images), batch):
        x = torch.from_numpy(np.ascontiguousarray(images[first : first + batch])).to(device)
        x = x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float()
        parts.append(tuple(y.cpu().numpy() for y in network(x)))
        if progress is not None:
            progress(min(first + batch, len(images)), len(images))
    return Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
