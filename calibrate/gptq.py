"""Rounding that makes up for its own errors, before anything is learned: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

A layer multiplies columns x by its weight W (C, K); for a convolution x is the patch under the kernel. Rounding to s q
costs, on the inputs that the quantized layer gets,

    E || (W - s q) x ||^2  =  tr (W - s q) H (W - s q)^T,      H = E[x x^T]

Columns of W are rounded one after the other, those with the largest H_jj first. What rounding column j costs is spread
over the columns that are still free, such that they make up for as much of it as they can:

    e = (w_j - s q_j) / U_jj,      w_k <- w_k - e U_jk  for k > j,      H^-1 = U^T U,  U upper triangular

The codes may be further from W than its two neighbours. What is handed on is the value each weight had when it was
rounded, so that learned rounding chooses between the neighbours of that.
"""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .grid import Grid
from .layers import QuantizedConv2d, QuantizedOperator, quantization
from .rounding import WeightQuantizer
from .trajectory import Progress, Trajectory, call

CALLS = 64  # of the network on one sample, spread over the chain and over the trajectories
ROWS = 256  # columns x taken of each
COLUMNS = 4608  # of H at most; a wider layer is rounded in parts that know nothing of each other
BYTES = 1 << 30  # of all H held at once; more operators than fit take more passes
DAMPING = 0.01  # of the mean diagonal, added to it: directions that no input showed are left alone
COLUMN_SECONDS = 1e-4  # of small operations for each column
BLOCK = 128  # columns that are rounded before the rest of W is brought up to date


@torch.no_grad()
def compensate(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    progress: Progress | None = None,
) -> None:
    """Round every weight so, given the scales; the quantizers then hold what was rounded, with the codes above.

    Inputs are those of the float network along `teacher`, put on the layer's own grid.
    """
    passes = list(_passes(operators))
    calls = min(CALLS, len(plan) * len(teacher.seeds))
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(passes) * calls)

    for some in passes:
        moments = _moments(network, {name: operators[name] for name in some}, plan, teacher, calls, tell)
        for name, weight in some.items():
            parts = zip(*(whole.split(COLUMNS, 1) for whole in weight.matrix), moments.pop(name), strict=True)
            made = [round_columns(w, scale, weight.grid, h) for w, scale, h in parts]
            weight.compensate(torch.cat(made, 1).reshape(weight.weight.shape))


def round_columns(weight: Tensor, scale: Tensor, grid: Grid, moments: Tensor) -> Tensor:
    """What each entry of `weight` (C, K) is when its turn comes; `moments` is H (K, K), `scale` (C, 1) or (C, K)."""
    w, s, h = weight.double(), scale.double().expand_as(weight), moments.double()
    damping = DAMPING * h.diagonal().mean()
    h.diagonal().add_(damping if damping > 0 else 1.0)
    order = h.diagonal().argsort(descending=True, stable=True)
    w, s, h = w[:, order], s[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    seen = torch.empty_like(w)
    for first in range(0, w.shape[1], BLOCK):
        last = min(first + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for j in range(first, last):
            seen[:, j] = w[:, j]
            rounded = grid.clamp(grid.nearest(w[:, j] / s[:, j])) * s[:, j]
            error = (w[:, j] - rounded) / upper[j, j]
            w[:, j:last] -= error[:, None] * upper[j, j:last]
            errors[:, j - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return seen[:, order.argsort()].to(weight.dtype)


def seconds(operators: dict[str, QuantizedOperator], device: torch.device) -> float:
    """About how long `compensate` will take beside its calls of the network, from one product of matrices."""
    square = torch.ones(768, 768, dtype=torch.float64, device=device)
    torch.mm(square, square)
    begun = time.perf_counter()
    float(torch.mm(square, square)[0, 0])
    rate = 2 * 768**3 / (time.perf_counter() - begun)
    work = 0.0
    for weights in _passes(operators):
        for weight in weights.values():
            for part in weight.matrix[0].split(COLUMNS, 1):
                rows, width = part.shape
                work += width**2 * (CALLS * ROWS + 4 * width + 2 * rows) + rate * COLUMN_SECONDS * width
    return work / rate


def _passes(operators: dict[str, QuantizedOperator]) -> Iterator[dict[str, WeightQuantizer]]:
    """The weights by operator, as many at a time as their H fit into BYTES."""
    some: dict[str, WeightQuantizer] = {}
    held = 0
    for name, operator in operators.items():
        weight = operator.weight_quantizer
        # The columns of a grouped convolution differ from group to group; it keeps rounding to nearest.
        if weight is None or (isinstance(operator, QuantizedConv2d) and operator.conv.groups > 1):
            continue
        needed = sum(4 * part.shape[1] ** 2 for part in weight.matrix[0].split(COLUMNS, 1))
        if some and held + needed > BYTES:
            yield some
            some, held = {}, 0
        some[name] = weight
        held += needed
    if some:
        yield some


def _moments(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    calls: int,
    tell: Callable[[], None],
) -> dict[str, list[Tensor]]:
    """H of every operator, one for each part of its columns, float32."""
    sums: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        operator = operators[name]

        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = _columns(operator, inputs)
            x = x[torch.linspace(0, len(x) - 1, min(ROWS, len(x)), device=x.device).round().long()]
            held = sums.setdefault(name, [x.new_zeros(part.shape[1], part.shape[1]) for part in x.split(COLUMNS, 1)])
            for total, part in zip(held, x.split(COLUMNS, 1), strict=True):
                total.addmm_(part.T, part)

        return look

    handles = [operator.register_forward_pre_hook(hook(name)) for name, operator in operators.items()]
    device = next(network.parameters()).device
    steps = torch.linspace(0, len(plan) - 1, calls).round().int().tolist()
    try:
        with quantization(operators, active=False):
            for n, i in enumerate(steps):
                which = [n % len(teacher.seeds)]
                call(network, plan, i, teacher.states[i, which].to(device), teacher.condition_of(which, device))
                tell()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _columns(operator: QuantizedOperator, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the flattened weight multiplies, (columns, K), of the operator's inputs on their grids."""
    on_grid = []
    for index, part in enumerate(operator.parts(inputs)):
        codes, scale = operator.input_codes(index, part)
        on_grid.append(codes * scale)
    if isinstance(operator, QuantizedConv2d):
        conv = operator.conv
        patches = F.unfold(torch.cat(on_grid, 1), conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
        return patches.transpose(1, 2).flatten(0, 1)
    return torch.cat(on_grid, -1).flatten(0, -2)
