"""Kernel Inception Distance on any features: the squared maximum mean discrepancy under a cubic kernel.

    k(x, y) = (x . y / d + 1)^3
    MMD^2   = 1/(m(m-1)) sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) - 2/m^2 sum_{i,j} k(x_i, y_j)

Without the diagonals the estimate is unbiased at every sample size: its expectation is 0 for equal
distributions, so it may well be negative, and numbers from different n compare. KID is its mean over B random
subsets of m out of n samples (Binkowski et al., "Demystifying MMD GANs", 2018).

Such subsets overlap, so std / sqrt(B) says how well the B draws are averaged, not how well n samples tell two
distributions apart. The standard error here is the delete-(n-m) jackknife's (Shao and Wu, 1989),

    SE^2 = m / (n - m)  1/B sum_s (MMD^2_s - mean)^2,

which, for m = n/2, is the plain standard deviation over subsets. Between equal distributions it errs on the
large side, by about sqrt(3) for halves, since MMD^2 is then quadratic in the empirical measures.
"""

from dataclasses import dataclass

import numpy as np
from accuquant.runtime.errors import AccuQuantError

ROWS = 1024  # of a kernel matrix at a time, so that memory grows with n and not with its square


@dataclass(frozen=True)
class Kid:
    """Mean of MMD^2 over `subsets` random subsets of `subset_size` samples, and its standard error."""

    mean: float
    standard_error: float
    subset_size: int
    subsets: int

    def __str__(self) -> str:
        return f"{1e3 * self.mean:.2f} ± {1e3 * self.standard_error:.2f} (x 1e-3)"


def kid(x: np.ndarray, y: np.ndarray, *, subset_size: int = 0, subsets: int = 100, seed: int = 0) -> Kid:
    """KID of features (n, d) against (n, d), any float type, in float64; subset size 0 stands for n // 2.

    Raises:
        AccuQuantError: features of unlike shape or not finite, or subsets of fewer than 2 or of all samples.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise AccuQuantError(f"features of shape {x.shape} and {y.shape}; (n, d), the same for both, is expected")
    n = len(x)
    m = subset_size or n // 2
    if not 2 <= m < n or subsets < 2:
        raise AccuQuantError(
            f"{subsets} subsets of {m} out of {n} samples; at least 2 subsets, of at least 2 and "
            "fewer than all samples, are needed: use more samples or another subset size"
        )
    for name, values in (("first", x), ("second", y)):
        if not np.isfinite(values).all():
            raise AccuQuantError(f"the {name} features are not all finite; look for broken pictures")
    generator = np.random.default_rng(seed)
    chosen_x, chosen_y = (_choices(generator, n, m, subsets) for _ in range(2))
    values = mmd2(x, y, chosen_x, chosen_y)
    error = float(values.std()) * (m / (n - m)) ** 0.5
    return Kid(float(values.mean()), error, m, subsets)


def mmd2(x: np.ndarray, y: np.ndarray, chosen_x: np.ndarray, chosen_y: np.ndarray) -> np.ndarray:
    """Unbiased MMD^2 of every subset: x (n, d), y (n', d), 0/1 rows (B, n) and (B, n') give float64 (B,)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    m, m_ = chosen_x.sum(axis=1), chosen_y.sum(axis=1)
    within_x = _sums(x, x, chosen_x, chosen_x) - chosen_x @ _diagonal(x)
    within_y = _sums(y, y, chosen_y, chosen_y) - chosen_y @ _diagonal(y)
    across = _sums(x, y, chosen_x, chosen_y)
    return np.asarray(within_x / (m * (m - 1)) + within_y / (m_ * (m_ - 1)) - 2 * across / (m * m_))


def _choices(generator: np.random.Generator, n: int, m: int, subsets: int) -> np.ndarray:
    chosen = np.zeros((subsets, n))
    for row in chosen:
        row[generator.choice(n, m, replace=False)] = 1.0
    return chosen


def _sums(x: np.ndarray, y: np.ndarray, chosen_x: np.ndarray, chosen_y: np.ndarray) -> np.ndarray:
    """The kernel summed over the pairs of each subset; its matrix is computed once for all of them."""
    total = np.zeros(len(chosen_x))
    for first in range(0, len(x), ROWS):
        rows = slice(first, first + ROWS)
        base = x[rows] @ y.T / x.shape[1] + 1.0
        total += (chosen_x[:, rows] @ (base * base * base) * chosen_y).sum(axis=1)
    return total


def _diagonal(x: np.ndarray) -> np.ndarray:
    return np.asarray((np.square(x).sum(axis=1) / x.shape[1] + 1.0) ** 3)
