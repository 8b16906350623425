"""How close two sets of pictures are: pair by pair, as distributions, and a set by itself. Pictures uint8 (N, H, W, C).

    FD  = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))        means and covariances of features
    IS  = exp E_x KL(p(y | x) || p(y))                             in ten parts, mean over them

PSNR and SSIM are the runtime's, which reports and every table of the project use (SSIM in whole windows; torchmetrics'
mean has reflected edges too). The Fréchet distance is here, so that FD needs no extra; tests hold it against
torchmetrics'. The Inception score is torchmetrics', LPIPS its authors' package, CLIP transformers'; all three are
optional, and asked for by name where missing.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuquant.calibrate.checkpoint import load_weights, read_checkpoint
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.fidelity import psnr, ssim
from accuquant.runtime.pictures import to_uint8
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # done, total


def of_pairs(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """PSNR's mean and lowest tenth in dB, SSIM's mean."""
    p, s = psnr(a, b), ssim(a, b)
    return {"psnr_mean": float(p.mean()), "psnr_p10": float(np.percentile(p, 10)), "ssim_mean": float(s.mean())}


def of_twins(fp: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The same of two samplings' ends, float (N, C, H, W), and their squared error within [-1, 1]."""
    errors = np.square(np.clip(fp, -1, 1) - np.clip(other, -1, 1)).reshape(len(fp), -1).mean(1)
    return of_pairs(to_uint8(fp), to_uint8(other)) | {
        "mse": float(errors.mean()),
        "mse_median": float(np.median(errors)),
    }


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and a factor F (k, d) of the covariance F^T F, float64, of so many features; n = 0: not told."""

    mean: np.ndarray
    factor: np.ndarray
    n: int

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features (n, d), with n - 1 below the covariance.

        Raises:
            AccuQuantError: fewer than two, or values that are not finite.
        """
        if len(features) < 2 or not np.isfinite(features).all():
            raise AccuQuantError(f"{len(features)} features; two at least are needed, all of them finite")
        mean = features.mean(axis=0, dtype=np.float64)
        centred = (features - mean) / np.sqrt(len(features) - 1)
        if len(centred) <= centred.shape[1]:
            return cls(mean, centred, len(features))
        return cls(mean, _root(centred.T @ centred), len(features))

    @classmethod
    def published(cls, mean: np.ndarray, covariance: np.ndarray) -> "Moments":
        """Moments from a file, whose n it does not tell."""
        return cls(mean.astype(np.float64), _root(covariance.astype(np.float64)), 0)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(np.sqrt(values.clip(min=0.0))[:, None] * vectors.T)


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet distance of the two Gaussians.

    tr (S_a S_b)^(1/2) is the sum of the singular values of F_a F_b^T, a matrix no larger than the samples are many.

    Raises:
        AccuQuantError: features of unlike width.
    """
    if a.mean.shape != b.mean.shape:
        raise AccuQuantError(f"features of {a.mean.size} and of {b.mean.size} numbers cannot be compared")
    traces = np.square(a.factor).sum() + np.square(b.factor).sum()
    shared = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    return float(np.square(a.mean - b.mean).sum() + traces - 2 * shared)


class _Given(nn.Identity):
    """Stands for a feature network where features are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def inception_score(logits: np.ndarray, seed: int = 0, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` random parts of logits (n, classes).

    Raises:
        AccuQuantError: fewer rows than parts, or torchmetrics is missing.
    """
    if len(logits) < splits:
        raise AccuQuantError(f"the Inception score in {splits} parts needs as many pictures; there are {len(logits)}")
    module = needed("torchmetrics.image.inception", "evaluate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept
        metric = module.InceptionScore(feature=_Given(logits.shape[1]), splits=splits)
    metric.update(torch.from_numpy(logits).double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def lpips_network(backbone: Path, device: str = "cpu") -> nn.Module:
    """LPIPS 0.1 on AlexNet: the authors' linear heads, which their package carries, on torchvision's weights in a file.

    Raises:
        AccuQuantError: a package is missing, or the file holds another network.
    """
    module = needed("lpips", "perceptual")
    network: nn.Module = module.LPIPS(net="alex", pnet_rand=True, verbose=False)
    stored = read_checkpoint(backbone)
    if not isinstance(stored, Mapping) or "features.10.weight" not in stored:
        raise AccuQuantError(f"{backbone} is not torchvision's AlexNet; alexnet-owt-7be5be79.pth is expected")
    trunk = {k.removeprefix("features."): v for k, v in stored.items() if k.startswith("features.")}
    # The package cuts the layers, which keep their numbers, into five slices.
    renamed = {name: trunk[name.split(".", 1)[1]] for name in network.net.state_dict()}  # type: ignore[operator, union-attr]
    load_weights(network.net, renamed, backbone)  # type: ignore[arg-type]
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def lpips(network: nn.Module, a: np.ndarray, b: np.ndarray, batch: int = 16, progress: Progress | None = None) -> float:
    """Mean LPIPS of the pairs; grey is shown as RGB."""
    total, device = 0.0, next(network.parameters()).device
    for first in range(0, len(a), batch):
        rows = slice(first, first + batch)
        left, right = (rgb(x[rows]).to(device).float() / 127.5 - 1 for x in (a, b))
        total += float(network(left, right).sum())
        if progress is not None:
            progress(min(first + batch, len(a)), len(a))
    return total / len(a)


def clip_score(
    pictures: np.ndarray, texts: Sequence[str], folder: Path, batch: int = 16, progress: Progress | None = None
) -> float:
    """Mean of max(100 cos(picture, text), 0) by the CLIP of a transformers folder, texts cut to what it reads.

    Its weights are read from safetensors only. (torchmetrics' own does not work with transformers 5.)

    Raises:
        AccuQuantError: transformers is missing, or the folder cannot be read.
    """
    transformers = needed("transformers", "perceptual")
    try:
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise AccuQuantError(f"{folder} holds no CLIP of transformers ({str(error)[:200]})") from error
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(pictures), batch):
            rows = slice(first, first + batch)
            given = processor(
                text=list(texts[rows]), images=list(rgb(pictures[rows])), return_tensors="pt", padding=True,
                truncation=True,
            )  # fmt: skip
            out = model(**given)  # both embeddings of unit length
            total += float((100 * (out.image_embeds * out.text_embeds).sum(dim=1)).clamp(min=0).sum())
            if progress is not None:
                progress(min(first + batch, len(pictures)), len(pictures))
    return total / len(pictures)


def rgb(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 1 or 3) as (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def needed(module: str, extra: str) -> Any:
    """An optional library.

    Raises:
        AccuQuantError: it is not installed, or does not fit what is; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision of another build than torch's: RuntimeError
        raise AccuQuantError(
            f"{module} cannot be imported ({error}); install it with: pip install 'accuquant[{extra}]'"
            + (" (torchvision of the same build as torch)" if extra == "perceptual" else "")
        ) from error


def number(metric: str, r: Mapping[str, Any]) -> str:
    """A row's value with what is known of its spread, in the unit its metric is quoted in."""
    if metric == "KID":
        return f"{1e3 * r['value']:.2f} ± {1e3 * r['standard_error']:.2f} (x 1e-3)"
    if metric == "PSNR":
        return f"{r['value']:.2f} (p10 {r['p10']:.2f}) dB"
    if metric == "IS":
        return f"{r['value']:.2f} ± {r['deviation']:.2f}"
    return f"{r['value']:.4f}" if metric in ("SSIM", "LPIPS") else f"{r['value']:.2f}"
