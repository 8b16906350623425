"""Starting scales, from what the full-precision network shows along teacher trajectories."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from .grid import Grid
from .layers import QuantizedOperator, RowTable, quantization
from .observers import Histogram, Range, max_weight_scale, min_max, mse_activation, mse_weight_scale, percentile
from .smooth import channel_peaks, smooth, smoothable
from .spec import Ranges
from .trajectory import Progress, Trajectory, call

OBSERVED_STEPS = 16  # spread over the chain: ranges drift with the noise level, slowly
OBSERVED_TRAJECTORIES = 16

Key = tuple[str, int, int]  # operator, quantizer, row of its table


@dataclass(frozen=True)
class Observed:
    """What reached every quantizer, by row where there is a table of `rows`."""

    histograms: dict[Key, Histogram]
    rows: int | None


def initialise(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    ranges: Ranges,
    progress: Progress | None = None,
    *,
    smoothing: float = 0.0,
) -> None:
    """Observe, and set every scale and zero point."""
    set_ranges(operators, observe(network, operators, plan, teacher, progress, smoothing=smoothing), ranges)


@torch.no_grad()
def observe(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    progress: Progress | None = None,
    *,
    smoothing: float = 0.0,
) -> Observed:
    """Histograms of all inputs of the float network, in the order of its calls.

    `smoothing` is SmoothQuant's alpha, by which inputs are evened out before; 0 does without.
    """
    table = next((q.table for op in operators.values() for q in op.quantizers), None)
    wanted = OBSERVED_STEPS if table is None else max(OBSERVED_STEPS, 2 * len(table))
    rows = torch.linspace(0, len(plan) - 1, min(wanted, len(plan))).round().int().tolist()
    passes = 3 if smoothing else 2
    done = 0

    def watch(see: Callable[[Key, Tensor], None]) -> None:
        nonlocal done

        def tell() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, passes * len(rows))

        _watch(network, operators, plan, teacher, rows, table, see, tell)

    if smoothing:
        chosen = dict(smoothable(operators))
        peaks: dict[str, Tensor] = {}

        def see_peaks(key: Key, x: Tensor) -> None:
            name, which, _ = key
            if name in chosen and which == 0:
                now = channel_peaks(x, chosen[name])
                peaks[name] = torch.maximum(peaks[name], now) if name in peaks else now

        watch(see_peaks)
        for name, operator in chosen.items():
            smooth(operator, peaks[name], smoothing)

    seen: dict[Key, Range] = defaultdict(Range)
    watch(lambda key, x: seen[key].add(x))
    histograms = {key: Histogram(between.low, between.high) for key, between in seen.items()}
    watch(lambda key, x: histograms[key].add(x))
    return Observed(histograms, None if table is None else len(table))


@torch.no_grad()
def set_ranges(operators: dict[str, QuantizedOperator], observed: Observed, ranges: Ranges) -> None:
    """Set every scale and zero point, for inputs by `ranges`; weights clip nothing with "min-max", else err least."""
    for operator in operators.values():
        weight = operator.weight_quantizer
        if weight is not None:
            pick = max_weight_scale if ranges == "min-max" else mse_weight_scale
            weight.set_scale(pick(weight.weight, weight.grid))
    find = {"mse": mse_activation, "min-max": min_max, "percentile": percentile}[ranges]
    found = {key: find(seen, operators[key[0]].quantizers[key[1]].grid) for key, seen in observed.histograms.items()}
    for (name, k, at), (scale, zero_point) in found.items():
        quantizer = operators[name].quantizers[k]
        if observed.rows is not None and not quantizer.grid.symmetric:
            scale, zero_point = _around_one_zero(found, (name, k, at), quantizer.grid)
        quantizer.set(scale, zero_point, at)


def _around_one_zero(found: dict[Key, tuple[Tensor, Tensor]], key: Key, grid: Grid) -> tuple[Tensor, Tensor]:
    """A row's scale around the mean zero point of its input's rows, such that the row's range stays whole."""
    zero_points = [zero for (name, k, _), (_, zero) in found.items() if (name, k) == key[:2]]
    common = torch.stack(zero_points).mean().round()
    scale, zero = found[key]
    below, above = common - grid.q_min, grid.q_max - common
    low, high = (zero - grid.q_min) * scale, (grid.q_max - zero) * scale
    needed = [part / codes for part, codes in ((low, below), (high, above)) if codes > 0]
    return torch.stack(needed).amax(), common


def _watch(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    plan: SamplingPlan,
    teacher: Trajectory,
    rows: list[int],
    table: RowTable | None,
    see: Callable[[Key, Tensor], None],
    tell: Callable[[], None],
) -> None:
    """Run the float network over the teacher's states at `rows` and show `see` all that has a quantizer."""
    at = 0

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            # Where weights alone are quantized, there is nobody to see an input.
            for index, (x, _) in enumerate(zip(operators[name].parts(inputs), operators[name].inputs, strict=False)):
                see((name, index, at), x)

        return look

    def behind(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def look(_: nn.Module, __: tuple[Any, ...], y: Tensor) -> None:
            see((name, len(operators[name].inputs), at), y)

        return look

    device, some = next(network.parameters()).device, slice(OBSERVED_TRAJECTORIES)
    handles = [op.register_forward_pre_hook(hook(name)) for name, op in operators.items()]
    handles += [op.register_forward_hook(behind(name)) for name, op in operators.items() if op.output is not None]
    try:
        with quantization(operators, active=False):
            for i in rows:
                at = 0 if table is None else table.row(plan.steps[i].timestep)
                call(network, plan, i, teacher.states[i, some].to(device), teacher.condition_of(some, device))
                tell()
    finally:
        for handle in handles:
            handle.remove()


def set_plausible(operators: Mapping[str, QuantizedOperator]) -> None:
    """Ranges of which nothing is known: activations within four units, every weight's channel by its largest entry.

    For what neither ranges nor pictures matter to, such as how long a graph takes.
    """
    for operator in operators.values():
        for quantizer in operator.quantizers:
            grid = quantizer.grid
            middle = 0.0 if grid.symmetric else float(1 << (grid.bits - 1))
            quantizer.set(torch.tensor(8.0 / (1 << grid.bits)), torch.tensor(middle))
        weight = operator.weight_quantizer
        if weight is not None:
            largest = weight.weight.flatten(1).abs().amax(1)
            weight.set_scale(largest.view_as(weight.scale).clamp(min=1e-8) / weight.grid.q_max)
