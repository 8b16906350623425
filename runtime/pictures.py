"""From latents to pictures: 8-bit pixels and contact sheets."""

import math

import numpy as np
from PIL import Image

from .errors import AccuQuantError

PAPER = 255  # what shows between pictures and in an unfilled last row


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Pixels of samples: float (N, C, H, W), -1 black and 1 white, clipped, to uint8 (N, H, W, C)."""
    levels = np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))


def near_square(n: int) -> int:
    """Columns of the smallest near-square sheet that holds `n` pictures."""
    return max(1, math.isqrt(max(n, 1) - 1) + 1)


def grid(pictures: np.ndarray, columns: int | None = None, scale: int = 2, gap: int = 2) -> Image.Image:
    """A contact sheet, filled row by row.

    uint8 (N, H, W, C) with C 1 (grey) or 3 (RGB); `columns` None makes it near-square, more columns than pictures are
    not drawn. Every pixel becomes `scale` x `scale`; `gap` white pixels separate pictures, none surround the sheet.

    Raises:
        AccuQuantError: there is no picture, or the array is of another kind.
    """
    _check(pictures)
    n, height, width, channels = pictures.shape
    columns = min(n, columns or near_square(n))
    rows = -(-n // columns)
    large = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    down, right = height * scale + gap, width * scale + gap
    sheet = np.full((rows * down - gap, columns * right - gap, channels), PAPER, np.uint8)
    for k, picture in enumerate(large):
        top, left = k // columns * down, k % columns * right
        sheet[top : top + height * scale, left : left + width * scale] = picture
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def _check(pictures: np.ndarray) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3) or not pictures.size:
        raise AccuQuantError(
            f"pictures are uint8 (N, H, W, C) with N > 0 and C 1 or 3, not {pictures.dtype} {pictures.shape}; "
            "models whose samples have other channels can be saved as .npy"
        )
