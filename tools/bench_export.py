"""Memory, time and size of an export at real sizes: denoisers in their published configurations, with random weights.

A case (shape, bits) runs in a process of its own, stage by stage. Ranges of plausible size stand for learned ones,
which neither memory nor time depends on; with --calibrate, one iteration of learning them comes first: M = 4 steps,
batch 1, exact gradient, scales and zero points.

    plausible ranges -> iteration -> freeze -> trace_float -> lower -> check_target -> 16-bit rest -> save -> check

Weights are mapped from a file, as those of a checkpoint can be. A stage's peak is the process's largest resident set
in it (Linux: VmHWM), in which mapped pages count although they can be dropped; what cannot is given at the end of every
stage (RssAnon), and --limit-gib limits it all the time (RLIMIT_DATA). A case that is estimated to need more than the
machine has free is not begun, and recorded as such.

With --compile the quantized graph goes through TensorRT-RTX ahead of time, for a GPU that need not be there; its peak
is that of the compiler's own process (Linux counts what starts it as well: never less than 0.4 GiB).

    python tools/bench_export.py --shape sd15 --bits 8/8,4/8 --compile sm89 --out tools/results/export-sizes.json
    python tools/bench_export.py --shape sdxl,ldm4-imagenet,dit-xl2,pixart-xl2,sd15 --bits 4/8 --calibrate \
        --limit-gib 16 --note "beside other work" --out tools/results/full-sizes.json

Convolutions and linear layers are quantized, the first and last convolution stay in float. Attention products do as
well: diffusers computes them inside torch's scaled_dot_product_attention, which is no module. Rows of an older --out of
the same machine and versions are kept, unless they are measured again.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuquant.calibrate.families import load_model
from accuquant.calibrate.initialise import set_plausible
from accuquant.calibrate.layers import QuantizedOperator, fast_compute, quantization, quantize_operators
from accuquant.calibrate.multistep import Group, GroupBatch, accumulate_gradient
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.rounding import training_codes
from accuquant.calibrate.scheme import QuantScheme, TargetName, parse_bits
from accuquant.calibrate.trace import trace
from accuquant.export.check_target import check_target
from accuquant.export.facts import versions
from accuquant.export.graph import save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.export.passes.cast_rest import cast_rest
from accuquant.export.verify import check_graph
from accuquant.runtime.console import console, machine_facts
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import write_text
from bench_calibration import BETAS, forget_peak, resident
from rich.table import Table
from shapes import SHAPES, activations, parameters, random_network, role_of
from torch import Tensor, nn

BUNDLED = Path(__file__).parent / "reference" / "fashion-ddim.ckpt"
BATCHES = (1, 2, 4)  # least, best, most; guidance needs two
BESIDE = 3 * 2**30  # bytes: libraries, the exporter's own structures, the largest layer in a few forms
KEY = ("shape", "scheme", "target", "calibrated")  # what rows of the report differ in
GROUP = 4  # steps that an iteration simulates
LEARNING = 4  # bytes a parameter that an iteration holds beside the weights: codes and their gradients
KEPT = 5  # times what layers write that an iteration keeps for the gradient: inputs, quantized ones, attention


def one_iteration(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    sample: tuple[int, ...],
    condition: Mapping[str, Tensor],
) -> None:
    """Simulate GROUP steps of DDIM with 20 from the middle of the chain, batch 1, and leave the exact gradient."""
    plan = trace("ddim", {**BETAS, "prediction_type": "epsilon", "timestep_spacing": "leading"}, 20)
    weights = [op.weight_quantizer for op in operators.values() if op.weight_quantizer is not None]
    x = torch.randn(1, *sample, generator=torch.Generator().manual_seed(1))
    data = GroupBatch(x, torch.zeros_like(x), {}, lambda j: torch.zeros_like(x), condition=condition)
    compute = fast_compute(next(network.parameters()).device)
    with quantization(operators, True, compute), training_codes(weights):
        accumulate_gradient(network, plan, Group(8, 8 + GROUP), data)
    for operator in operators.values():
        operator.zero_grad(set_to_none=True)


def export_case(
    name: str, bits: tuple[int, int], target: TargetName, folder: Path, calibrate: bool = False
) -> dict[str, Any]:
    """Export into `folder`, in this process; what it took, stage by stage."""
    stages: dict[str, dict[str, float]] = {}

    def stage(title: str, work: Callable[[], Any]) -> Any:
        forget_peak()
        begun, computed = time.perf_counter(), time.process_time()
        result = work()
        stages[title] = {
            "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - computed,
            "peak_bytes": resident("VmHWM"), "held_bytes": resident("RssAnon"),
        }  # fmt: skip
        return result

    rest = "float16" if target == "tensorrt" else "float32"
    scheme = QuantScheme(weight_bits=bits[0], activation_bits=bits[1], target=target, rest=rest)
    roles, sample, condition = role_of, (), dict[str, Tensor]()
    if name in SHAPES:
        network = stage("random weights", lambda: random_network(SHAPES[name], folder))
        roles, sample, condition = SHAPES[name].role_of, SHAPES[name].sample, dict(SHAPES[name].condition)
    else:
        loaded = stage("load", lambda: load_model(BUNDLED))
        network, roles, sample = loaded.network, loaded.role_of, loaded.sample_shape
    count = sum(p.numel() for p in network.parameters())
    operators = quantize_operators(network, scheme, roles)
    stage("ranges", lambda: set_plausible(operators))
    if calibrate:
        stage(f"iteration, M = {GROUP}", lambda: one_iteration(network, operators, sample, condition))
    recipe = stage("freeze", lambda: freeze(operators, scheme, {}))
    float_graph = stage("trace", lambda: trace_float(network, operators, sample, condition))
    quantized, twin = stage("lower", lambda: lower(float_graph, recipe, target))
    stage("check target", lambda: check_target(quantized, recipe.facts.operators, target))
    stage("save twin", lambda: save_graph(twin, folder / "twin.onnx"))
    if rest != "float32":
        stage("16-bit rest", lambda: cast_rest(quantized, rest))
    stage("save quantized", lambda: save_graph(quantized, folder / "denoiser.onnx"))
    for graph in ("twin", "denoiser"):
        stage(f"check {graph}", lambda graph=graph: check_graph(folder / f"{graph}.onnx"))
    (folder / "operators.json").write_text(json.dumps(list(recipe.facts.operators)))
    return {
        "parameters": count,
        "operators": dict(Counter(facts.kind for facts in recipe.facts.operators.values())),
        "quantized_parameters": sum(codes.numel() for codes in recipe.codes.values()),
        "stages": stages,
        "seconds": sum(s["seconds"] for s in stages.values()),
        "cpu_seconds": sum(s["cpu_seconds"] for s in stages.values()),
        "peak_bytes": max(s["peak_bytes"] for s in stages.values()),
        "held_bytes": max(s["held_bytes"] for s in stages.values()),
        "files": {p.name: p.stat().st_size for p in sorted(folder.glob("*.onnx*"))},
    }


def compile_case(gpu: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Compile the exported graph; the compiler is this process's only child, so the largest child is its peak."""
    begun = time.perf_counter()
    plan = folder / "plan"
    try:
        compiled = compile_plan(CompileRequest(folder / "denoiser.onnx", gpu, BATCHES), plan, seconds=seconds)
    except AccuQuantError as error:
        return {"gpu": gpu, "refused": str(error), "seconds_to_refusal": time.perf_counter() - begun}
    operators = json.loads((folder / "operators.json").read_text())
    found = compiled.precisions(operators)
    return {
        "gpu": gpu,
        "batches": BATCHES,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "plan_bytes": plan.stat().st_size,
        "weights_bytes": compiled.weights_bytes,
        "activation_bytes": compiled.activation_bytes,
        "kernels": len(compiled.kernels),
        "operators_by_precision": dict(Counter(found.values())),
        "operators_without_kernel": sorted(set(operators) - found.keys()),
    }


def needed(name: str, calibrate: bool = False) -> tuple[int, int, int]:
    """Bytes that an export is estimated to hold, those that a compilation is, and those that this machine has free."""
    count = parameters(SHAPES[name]) if name in SHAPES else 0
    free = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    need = count + BESIDE
    if calibrate and name in SHAPES:
        need = LEARNING * count + KEPT * activations(SHAPES[name]) + BESIDE
    return need, 4 * count + BESIDE, int(free.split()[1]) * 1024


def in_child(arguments: list[str], what: str, limit_gib: float) -> dict[str, Any]:
    """The JSON that a process of its own printed last; {"beyond_bytes"} if it was refused memory.

    Raises:
        SystemExit: it failed of something else; with its last words.
    """
    command = [sys.executable, __file__, *arguments, "--limit-gib", str(limit_gib)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return dict(json.loads(child.stdout.splitlines()[-1]))
    if any(word in child.stderr for word in ("MemoryError", "can't allocate", "bad_alloc", "Cannot allocate")):
        return {"beyond_bytes": int(limit_gib * 2**30)}
    raise SystemExit(f"{what} failed ({child.returncode}):\n{child.stderr[-3000:]}")


def main(
    out: Annotated[Path, typer.Option()] = Path("build/export-sizes.json"),
    shape: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}, bundled; several with commas.")] = "bundled",
    bits: Annotated[str, typer.Option(help="Weights/activations; several with commas.")] = "8/8,4/8",
    target: Annotated[str, typer.Option(help="tensorrt, cpu or onnxruntime.")] = "tensorrt",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="One iteration of calibration, M = 4, first.")] = False,
    compile_for: Annotated[str, typer.Option("--compile", help="A GPU for TensorRT-RTX, such as sm89.")] = "",
    seconds: Annotated[float, typer.Option(help="How long a compilation may take.")] = 3600,
    limit_gib: Annotated[float, typer.Option(help="Memory of a case that cannot be dropped; given up beyond it.")] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    note: Annotated[str, typer.Option(help="What a reader must know of the machine, such as other work on it.")] = "",
    work: Annotated[Path, typer.Option(help="Where graphs are written, and removed again.")] = Path("build"),
    cell: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure every case, print the table and write JSON."""
    if threads:
        torch.set_num_threads(threads)
    if cell:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * 2**30),) * 2)
        case = export_case(shape, parse_bits(bits), target, work, calibrate) if cell == "export" else None  # type: ignore[arg-type]
        print(json.dumps(case or compile_case(compile_for, work, seconds)))
        return
    if unknown := set(shape.split(",")) - {*SHAPES, "bundled"}:
        raise AccuQuantError(f"unknown shape {min(unknown)}; known: {', '.join(SHAPES)}, bundled")
    if compile_for and target != "tensorrt":
        raise AccuQuantError(f"--compile {compile_for} takes graphs for tensorrt; leave --target {target} out")
    report = {
        "schema_version": 1,
        "limit_bytes": int(limit_gib * 2**30),
        "threads": torch.get_num_threads(),
        "machine": machine_facts(),
        "versions": versions() | {"tensorrt-rtx": compiler_version()},
        "note": note,
    }
    rows = kept_rows(out, report)
    work.mkdir(parents=True, exist_ok=True)
    for name in shape.split(","):
        for pair in bits.split(","):
            key = {"shape": name, "scheme": "W{}A{}".format(*parse_bits(pair)), "target": target}
            key |= {"calibrated": True} if calibrate else {}
            need, _, free = needed(name, calibrate)
            row = {**key, "estimated_bytes": need}
            if need > min(free, limit_gib * 2**30):
                row |= {"free_bytes": free}
                console.print(f"{name} {pair}: not begun; about {gib(need)} GiB are needed, {gib(free)} are free")
            else:
                console.print(f"{name} {pair}: begun; about {gib(need)} GiB are needed, {gib(free)} are free")
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    row |= measured(
                        name, pair, target, compile_for, Path(folder), seconds, limit_gib, threads, calibrate
                    )
            rows = [r for r in rows if any(r.get(k, False) != key.get(k, False) for k in KEY)] + [row]
            write_text(out, json.dumps({**report, "rows": rows}, indent=1) + "\n")
    console.print(table(rows))


def measured(
    name: str,
    pair: str,
    target: str,
    gpu: str,
    folder: Path,
    seconds: float,
    limit_gib: float,
    threads: int,
    calibrate: bool = False,
) -> dict[str, Any]:
    """A row of the report, from the two processes that make it."""
    shared = ["--shape", name, "--bits", pair, "--target", target, "--work", str(folder), "--threads", str(threads)]
    learning = ["--calibrate"] if calibrate else []
    row = in_child([*shared, *learning, "--cell", "export"], f"{name} {pair}", limit_gib)
    if not gpu or "peak_bytes" not in row:
        return row
    _, need, free = needed(name)
    if need > min(free, limit_gib * 2**30):
        console.print(f"{name} {pair}: not compiled; about {gib(need)} GiB are needed, {gib(free)} are free")
        return row | {"compiled": {"gpu": gpu, "estimated_bytes": need, "free_bytes": free}}
    compiling = [*shared, "--compile", gpu, "--seconds", str(seconds), "--cell", "compile"]
    return row | {"compiled": in_child(compiling, f"compiling {name} {pair}", limit_gib)}


def kept_rows(out: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an older report that was measured under the same conditions."""
    older = json.loads(out.read_text()) if out.exists() else {"rows": []}
    alike = all(older.get(key) == report[key] for key in ("schema_version", "threads", "machine", "versions"))
    return list(older["rows"]) if alike else []


def compiler_version() -> str:
    try:
        return metadata.version("tensorrt-rtx-cu13")
    except metadata.PackageNotFoundError:
        return "not installed"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a case; sizes in GiB."""
    made = Table(title="Export: sizes and peaks in GiB")
    exported = (
        "shape",
        "scheme",
        "parameters",
        "operators",
        "iteration",
        "s",
        "peak",
        "held",
        "s",
        "twin",
        "quantized",
    )
    for column in (*exported, "compile peak", "s", "plan", "kernels"):
        made.add_column(column, justify="right")
    for row in rows:
        files, compiled = row.get("files"), row.get("compiled", {})
        if files is None:
            reason = "> " + gib(row.get("beyond_bytes", row["estimated_bytes"]))
            made.add_row(row["shape"], row["scheme"], "-", "-", "-", "-", reason, *["-"] * 8)
            continue
        sizes = [gib(sum(size for f, size in files.items() if f.startswith(g))) for g in ("twin", "denoiser")]
        learned = row["stages"].get(f"iteration, M = {GROUP}")
        iteration = (gib(learned["peak_bytes"]), f"{learned['seconds']:.0f}") if learned else ("-", "-")
        kernels = ", ".join(f"{n} {kind}" for kind, n in compiled.get("operators_by_precision", {}).items())
        missing = ["refused" if "refused" in compiled else "-", *["-"] * 3]
        made.add_row(
            row["shape"], row["scheme"], f"{row['parameters'] / 1e6:.0f} M", str(sum(row["operators"].values())),
            *iteration, gib(row["peak_bytes"]), gib(row["held_bytes"]), f"{row['seconds']:.0f}", *sizes,
            *([gib(compiled["peak_bytes"]), f"{compiled['seconds']:.0f}", gib(compiled["plan_bytes"]), kernels]
              if "seconds" in compiled else missing),
        )  # fmt: skip
    return made


if __name__ == "__main__":
    typer.run(main)
