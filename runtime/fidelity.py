"""How close two pictures are: PSNR and SSIM, for 8-bit pictures, picture by picture.

    PSNR = 10 log10( 255^2 / mean (a - b)^2 )

    SSIM = mean over windows of  (2 m_a m_b + C_1)(2 s_ab + C_2) / ((m_a^2 + m_b^2 + C_1)(s_a^2 + s_b^2 + C_2))

with Gaussian-weighted means m, variances s^2 and covariance s_ab in 11 x 11 windows (sigma 1.5) that lie wholly within
the picture, C_1 = (0.01 * 255)^2 and C_2 = (0.03 * 255)^2; colour channels are averaged. Wang et al., "Image quality
assessment: from error visibility to structural similarity", 2004.
"""

import numpy as np

from .errors import AccuQuantError

PEAK = 255.0
PSNR_CAP = 99.0  # dB; what identical pictures get instead of infinity, so that means and files stay finite
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR in dB of each pair, capped at 99 dB: two uint8 (N, H, W, C) to float64 (N,).

    Raises:
        AccuQuantError: the arrays are of another kind, or differ in shape.
    """
    _check(a, b)
    error = np.array([np.mean((p.astype(np.float64) - q) ** 2) for p, q in zip(a, b, strict=True)])
    with np.errstate(divide="ignore"):
        return np.minimum(10.0 * np.log10(PEAK**2 / error), PSNR_CAP)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean SSIM of each pair, in [-1, 1]: two uint8 (N, H, W, C) to float64 (N,).

    Pictures narrower than 11 pixels are judged in the largest odd window that fits.

    Raises:
        AccuQuantError: the arrays are of another kind, or differ in shape.
    """
    _check(a, b)
    weights = _gaussian(min(WINDOW, *a.shape[1:3]))
    # One picture at a time: the six filtered maps of a large batch would not fit into memory.
    return np.array([_ssim(p.astype(np.float64), q.astype(np.float64), weights) for p, q in zip(a, b, strict=True)])


def _ssim(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    mean_a, mean_b = _blur(a, weights), _blur(b, weights)
    variance_a = _blur(a * a, weights) - mean_a**2
    variance_b = _blur(b * b, weights) - mean_b**2
    covariance = _blur(a * b, weights) - mean_a * mean_b
    above = (2.0 * mean_a * mean_b + C1) * (2.0 * covariance + C2)
    below = (mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2)
    return float(np.mean(above / below))


def _gaussian(size: int) -> np.ndarray:
    """Normalised weights of an odd window no larger than `size`."""
    radius = (size - 1) // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / SIGMA) ** 2)
    return np.asarray(weights / weights.sum())


def _blur(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over all whole windows: (H, W, C) to (H - k + 1, W - k + 1, C). The window is separable."""
    rows, columns = (x.shape[axis] - len(weights) + 1 for axis in (0, 1))
    tall = sum(w * x[k : k + rows] for k, w in enumerate(weights))
    return np.asarray(sum(w * tall[:, k : k + columns] for k, w in enumerate(weights)))


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 4 or a.shape != b.shape:
        raise AccuQuantError(
            f"fidelity compares two equally shaped uint8 (N, H, W, C) arrays, not {a.dtype} {a.shape} and "
            f"{b.dtype} {b.shape}"
        )
