"""What `accuquant-export` says at its end: every layer's two precisions, sizes, memory, fidelity and time, each apart.

Layers that are stored and computed alike are one line, and those that do not get what they asked for are named; the
report has them one by one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table

from ..calibrate.guard import verdict
from ..runtime.bundle import Bundle, Manifest, OperatorFacts
from ..runtime.inspection import judge
from .build import Result
from .measure import Comparison
from .request import Request

KINDS = {
    "conv": ("convolution", "convolutions"),
    "linear": ("linear layer", "linear layers"),
    "matmul": ("product of activations", "products of activations"),
}
NAMED = 4  # layers by name in a line


def summary(request: Request, result: Result) -> Table:
    manifest, comparison = result.bundle.manifest, result.comparison
    table = Table(title=f"{request.checkpoint.resolve().name} at {manifest.scheme}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    on_target = computes_as_the_target(manifest, comparison)
    for n, line in enumerate(layers(manifest, comparison.runs_as if on_target else None, comparison.kept_in_float)):
        table.add_row("" if n else "layers", line)
    if not on_target:
        table.add_row("", "what a GPU computes them in, its compiler says: accuquant-inspect BUNDLE --gpu sm89")
    if request.tuning is not None:
        table.add_row("left in float for speed", request.tuning.told)
    for head, line in (*_sizes(result.bundle), *_fidelity(request, result)):
        table.add_row(head, line)
    times, n = comparison.seconds, len(comparison.psnr)
    if on_target:
        table.add_row(
            f"time of {n} pictures",
            f"fp32 {times['twin']:.1f} s, int {times['denoiser']:.1f} s, one after the other on {comparison.engine}; "
            "side by side: accuquant-bench",
        )
    else:
        table.add_row("time", f"not measured: this is for {manifest.target}, and {comparison.engine} stood in for it")
    return table


def computes_as_the_target(manifest: Manifest, comparison: Comparison) -> bool:
    """Was the bundle sampled by an engine that it is for? Without a GPU another one stands in for TensorRT."""
    return manifest.target != "tensorrt" or comparison.engine.startswith("TensorRT")


def layers(manifest: Manifest, runs_as: Mapping[str, str] | None, kept_in_float: Mapping[str, str]) -> Iterator[str]:
    """A line for all layers that are alike, the most frequent first; then who deviates, and what was left in float.

    `runs_as` holds what the engine computes each in, as far as it tells; None where that engine does not matter.
    """
    alike: Counter[tuple[str, str]] = Counter()
    deviating: dict[str, list[str]] = {}
    for found in judge(manifest.operators, runs_as or {}, kept_in_float):
        facts = manifest.operators[found.operator]
        line = _stored(facts)
        if runs_as is not None and not facts.in_table:
            line += f", computed as {found.got}" if runs_as else ", the engine does not say computed as what"
            if runs_as and found.why:
                deviating.setdefault(f"computed as {found.got}: {found.why}", []).append(found.operator)
        alike[facts.kind, line] += 1
    for (kind, line), count in alike.most_common():
        yield f"{count} {KINDS[kind][count > 1]}: {line}"
    for why, names in deviating.items():
        yield f"of these {_named(names)} {why}"
    reasons: dict[str, list[str]] = {}
    for name, why in manifest.in_float.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield f"left in float: {_named(names)} ({why})"


def _stored(facts: OperatorFacts) -> str:
    if facts.weight_bits is None:
        return " x ".join(facts.inputs)
    weights = f"{facts.weight_bits}-bit weights"
    return f"{weights}, looked up by timestep" if facts.in_table else f"{weights}, stored as {facts.weight_container}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more (all in the report)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _sizes(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """On disk, and in memory: CPUs multiply bytes, whatever weights are stored in."""
    sides = {side: bundle.weight_bytes(side) for side in ("twin", "denoiser")}
    ratio = sides["twin"] / sides["denoiser"]
    yield "graph on disk", f"{_mib(sides['denoiser'])}, {ratio:.1f}x smaller than fp32 ({_mib(sides['twin'])})"
    whole = sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file())
    yield "bundle on disk", f"{_mib(whole)}, with both graphs, the recipe, the report and what else it needs"
    operators = bundle.manifest.operators.values()
    if operators:
        stored = sum(facts.stored_bytes for facts in operators)
        widened = sum(0 if facts.in_table else facts.parameters for facts in operators)
        held = stored if bundle.manifest.target == "tensorrt" else widened
        yield "quantized weights", f"{_mib(stored)} stored, {_mib(held)} in memory, counted and not measured"


def _fidelity(request: Request, result: Result) -> Iterator[tuple[str, str]]:
    comparison, held = result.comparison, result.outcome
    n, p = len(comparison.psnr), np.percentile(comparison.psnr, [10, 90])
    spread = f"{p[0]:.1f}..{p[1]:.1f} p10..p90"
    yield "PSNR to the fp twin", f"{comparison.psnr.mean():.2f} dB mean, {spread}, n = {n}"
    yield "SSIM to the fp twin", f"{comparison.ssim.mean():.4f} mean, n = {n}"
    if result.bundle.manifest.operators:
        yield "begun from", str(held.beginning)
        yield (
            "end-of-chain error",
            f"{held.begun}, {held.best:.2e} kept (iteration {held.kept}; n = {request.spec.held_out} held out)",
        )
    if held.groups:
        yield f"groups of {request.spec.group} steps", verdict(held.groups)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
