"""Other quantizers beside ours: from one float graph, on one set of calibration data, on the same engines and seeds.

NNCF, ONNX Runtime's static quantizer and ModelOpt are run as tools/peers/ says, each in an environment of its own that
is made on the first run. They are given what a bundle's float twin is called with along its own trajectories, from
seeds that nobody is judged on. Then all of them, our bundles and the twin

    budget     calls along trajectories that were looked at, and seconds until the graph was written
    coverage   how many of the kernels that multiply do so in 8 bits, by the engine's own report
    compile    the same by TensorRT-RTX, ahead of time, with the plan's size, for graphs in ONNX
    speed      a step's median CPU time, all graphs interleaved in one run
    quality    the same seeds through the whole plan, compared with the twin's: pictures, and distance at every step

    python tools/yardsticks.py BUNDLE-w8a8 BUNDLE-w4a8 --out tools/results/yardsticks.json

A peer that cannot be installed or fails is a row that says why.
"""

import json
import shutil
import subprocess
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import onnx
import typer
from accuquant.export.build import TEACHER_SEEDS
from accuquant.export.facts import versions
from accuquant.export.figures import lines, markup
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.engines import choose
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import write_text
from calls import recorded, write
from rich.table import Table
from side_by_side import Run, compiled, coverage, fidelity, sample, step_seconds

PEERS = Path(__file__).parent / "peers"
CHAINS = 16  # that calibration data comes from, over all their steps
SECONDS = 1800  # for a peer to quantize
SAID = 300  # characters of a failure


@dataclass(frozen=True)
class Library:
    """A peer's script and what its environment holds."""

    script: str
    requirements: tuple[str, ...]


LIBRARIES: Mapping[str, Library] = {
    "nncf": Library("nncf_int8.py", ("nncf==3.4.0", "openvino==2026.4.1")),
    "onnxruntime": Library("onnxruntime_static.py", ("onnxruntime==1.32.0", "onnx==1.23.2", "sympy")),
    "modelopt": Library("modelopt_int8.py", ("nvidia-modelopt[onnx]==0.47.0",)),
}


@dataclass(frozen=True)
class Candidate:
    """A peer with its settings, the kind of file it writes and the engine that its graph is made for."""

    name: str
    library: str
    settings: Mapping[str, Any]
    suffix: str = ".onnx"
    engine: str = "openvino"
    like_ours: bool = False  # does it leave in float what our bundle does?
    script: str = ""  # the library's own unless named


def _nncf(name: str, preset: str, model_type: str = "none", *, fast: bool = True, like_ours: bool = False) -> Candidate:
    settings = {"preset": preset, "model_type": model_type, "fast_bias_correction": fast}
    return Candidate(f"NNCF {name}", "nncf", settings, ".xml", like_ours=like_ours)


CANDIDATES = (
    _nncf("performance", "performance"),
    _nncf("mixed", "mixed"),
    _nncf("mixed, accurate bias", "mixed", fast=False),
    _nncf("mixed, transformer", "mixed", "transformer"),
    _nncf("mixed, ends in float", "mixed", like_ours=True),
    _nncf("mixed, transformer, ends in float", "mixed", "transformer", like_ours=True),
    *(
        Candidate(f"ONNX Runtime {c}", "onnxruntime", {"calibration": c, "symmetric": False}, engine="onnxruntime")
        for c in ("MinMax", "Percentile")
    ),
    Candidate(
        "ONNX Runtime MinMax, ends in float", "onnxruntime", {"calibration": "MinMax", "symmetric": False},
        engine="onnxruntime", like_ours=True,
    ),
    # Made for TensorRT; sampled on ONNX Runtime, since OpenVINO 2026.4 loses the sign of int8 behind a concatenation.
    Candidate(
        "ONNX Runtime MinMax, symmetric", "onnxruntime", {"calibration": "MinMax", "symmetric": True},
        engine="onnxruntime",
    ),
    *(
        Candidate(f"ModelOpt {c}", "modelopt", {"calibration": c}, engine="onnxruntime") for c in ("max", "entropy")
    ),
    Candidate(
        "ModelOpt max, ends in float", "modelopt", {"calibration": "max"}, engine="onnxruntime", like_ours=True
    ),
)  # fmt: skip


@dataclass
class Contestant:
    """A graph that is measured, and its row so far."""

    graph: Path
    engine: str
    row: dict[str, Any] = field(default_factory=dict)


def environment(library: str, folder: Path) -> Path:
    """The interpreter of a library's environment, which is made if it is not there.

    Raises:
        AccuQuantError: it cannot be installed; says why in the installer's words.
    """
    home, asked = folder / library, LIBRARIES[library]
    python, done = home / "bin" / "python", home / "installed.txt"
    if done.exists() and done.read_text() == "\n".join(asked.requirements):
        return python
    venv.create(home, with_pip=True, clear=True)
    made = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *asked.requirements], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise AccuQuantError(f"{library} cannot be installed: {_last(made.stderr)}")
    done.write_text("\n".join(asked.requirements))
    return python


def float_products(bundle: Bundle, graph: Path) -> list[str]:
    """Nodes of a float graph that multiply, and that the bundle does not quantize."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    products = [node.name for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [name for name in products if name not in bundle.manifest.operators]


def quantize(candidate: Candidate, keep: Sequence[str], graph: Path, data: Path, folder: Path, python: Path) -> Path:
    """The peer's graph of `graph`, with the nodes `keep` in float.

    Raises:
        AccuQuantError: it failed, or took too long; with its last words.
    """
    out = folder / f"{candidate.name.replace(' ', '-').replace(',', '')}{candidate.suffix}"
    script = PEERS / (candidate.script or LIBRARIES[candidate.library].script)
    own = shutil.copy(graph, folder / "float.onnx")  # some write into the graph that they read
    if (weights := graph.with_name(f"{graph.name}.data")).exists():
        shutil.copy(weights, folder)  # under the name that the graph has for them
    asked = [python, script, own, data, out, json.dumps({**candidate.settings, "keep": list(keep)})]
    try:
        child = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise AccuQuantError(f"{candidate.name} took longer than {SECONDS} s") from error
    if child.returncode or not out.exists():
        raise AccuQuantError(f"{candidate.name} failed: {_last(child.stderr)}")
    return out


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")[:SAID]


def contestants(
    bundles: Sequence[Bundle], candidates: Sequence[Candidate], samples: int, environments: Path, folder: Path
) -> dict[str, Contestant]:
    """All graphs by name, the first bundle's twin first; a peer that failed has no graph but a reason in its row."""
    first = bundles[0]
    data = calibration_data(first, samples, folder)
    found = {"fp32": Contestant(first.graph("twin"), choose("auto", first.manifest.target))}
    for bundle in bundles:
        target, spec = bundle.manifest.target, bundle.manifest.provenance["calibration"]
        row = {"calibration": spec, "target": target, "quantize_seconds": _seconds(bundle)}
        row["samples"] = (spec["trajectories"] + spec["held_out"]) * len(bundle.plan)
        name = f"AccuQuant {bundle.manifest.scheme}, {target}{'' if spec['iterations'] else ', ranges only'}"
        if name in found:
            raise AccuQuantError(f"{bundle.folder} is the second of {name}; leave one of them out")
        found[name] = Contestant(bundle.graph("denoiser"), choose("auto", target), row)
    return found | peers(first, first.graph("twin"), candidates, samples, data, environments, folder)


def calibration_data(bundle: Bundle, samples: int, folder: Path) -> Path:
    """What the float twin is called with from seeds that nobody is judged on, written into `folder`."""
    path = folder / "data.npz"
    write(recorded(bundle, range(TEACHER_SEEDS, TEACHER_SEEDS + CHAINS), samples), path)
    return path


def peers(
    bundle: Bundle, graph: Path, candidates: Sequence[Candidate], samples: int, data: Path, environments: Path,
    folder: Path,
) -> dict[str, Contestant]:  # fmt: skip
    """Every candidate's quantization of a float graph of the bundle's network; graphs are written into `folder`."""
    found = {}
    for candidate in candidates:
        keep = float_products(bundle, graph) if candidate.like_ours else []
        row: dict[str, Any] = {"settings": {**candidate.settings, "keep": keep}, "samples": samples}
        row |= {"requirements": LIBRARIES[candidate.library].requirements}
        found[candidate.name] = Contestant(Path(), candidate.engine, row)
        begun = time.perf_counter()
        try:
            python = environment(candidate.library, environments)
            begun = time.perf_counter()
            found[candidate.name].graph = quantize(candidate, keep, graph, data, folder, python)
        except AccuQuantError as error:
            row["failed"] = str(error)
        row["quantize_seconds"] = time.perf_counter() - begun
        console.print(f"{candidate.name}: {row.get('failed', 'quantized')}, {row['quantize_seconds']:.0f} s")
    return found


def measure(
    found: Mapping[str, Contestant], bundle: Bundle, n: int, repeats: int, threads: int, gpu: str, folder: Path
) -> None:
    """Fill every contestant's row; one that an engine refuses keeps the reason."""
    plan, shape, fp = bundle.plan, bundle.manifest.sample_shape, None
    running: dict[str, tuple[Path, str]] = {}
    with bar() as show:
        for k, (name, one) in enumerate(found.items()):
            show("sampling", k, len(found), name)
            if "failed" in one.row:
                continue
            try:
                run: Run = sample(one.graph, one.engine, plan, range(n), shape)
                one.row |= {"engine": one.engine, "file_bytes": _bytes(one.graph)}
                one.row |= {"coverage": coverage(one.graph, one.engine)}
            except AccuQuantError as error:
                one.row["failed"] = str(error)
                continue
            fp = fp or run
            one.row |= fidelity(fp, run)
            if one.graph.suffix == ".onnx":
                one.row["compiled"] = compiled(one.graph, gpu, folder)
            running[name] = (one.graph, one.engine)
        timesteps = [step.timestep for step in plan.steps]
        for batch in (1, 8):
            taken = step_seconds(
                running, timesteps, shape, batch, repeats, threads,
                lambda done, total, batch=batch: show(f"batch {batch}", done, total, ""),  # type: ignore[misc]
            )  # fmt: skip
            for name, seconds in taken.items():
                found[name].row.setdefault("step_seconds", {})[str(batch)] = seconds


def _seconds(bundle: Bundle) -> float:
    """That its calibration and export took, by its report."""
    report = bundle.folder / "report" / "report.json"
    times = json.loads(report.read_text())["times"]
    return float(times["calibration"] + times["export"])


def _bytes(graph: Path) -> int:
    """On disk, with what lies beside the graph: external data, or the weights of an OpenVINO file."""
    beside = (graph.with_name(graph.name + ".data"), graph.with_suffix(".bin"))
    return sum(path.stat().st_size for path in (graph, *beside) if path.exists())


def table(report: Mapping[str, Any]) -> Table:
    made = Table(title=f"n = {report['n']} seeds, {report['steps']} steps, {report['samples']} calibration samples")
    columns = (
        "",
        "PSNR dB",
        "p10",
        "MSE, median",
        "8-bit kernels",
        "RTX",
        "plan",
        "MiB",
        "ms at 1",
        "ms at 8",
        "made in",
    )
    for column in columns:
        made.add_column(column, justify="left" if not column else "right")
    for name, row in report["rows"].items():
        if "failed" in row:
            made.add_row(name, row["failed"])
            continue
        rtx, covered = row.get("compiled", {}), row["coverage"]
        plan = f"{rtx['plan_bytes'] / 2**20:.2f}" if "plan_bytes" in rtx else "-"
        told = "refused" if "refused" in rtx else f"{rtx['low_bit']}/{rtx['all']}" if rtx else "-"
        cpu = (f"{row['step_seconds'][batch]['cpu'] * 1e3:.2f}" for batch in ("1", "8"))
        made.add_row(
            name, f"{row['psnr_mean']:.2f}", f"{row['psnr_p10']:.2f}", f"{row['mse_median']:.2e}",
            f"{covered['low_bit']}/{covered['all']}", told,
            plan, f"{row['file_bytes'] / 2**20:.2f}", *cpu,
            f"{row['quantize_seconds']:.0f} s" if "quantize_seconds" in row else "-",
        )  # fmt: skip
    return made


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Folders written by accuquant-export; the first has the twin.")],
    out: Annotated[Path, typer.Option()] = Path("build/yardsticks.json"),
    peers: Annotated[str, typer.Option(help=f"Of {', '.join(LIBRARIES)}.")] = ",".join(LIBRARIES),
    environments: Annotated[Path, typer.Option(help="Where the peers are installed.")] = Path("build/yardsticks"),
    samples: Annotated[int, typer.Option(help="Calibration data of the peers, along trajectories.")] = 256,
    n: Annotated[int, typer.Option(help="Judged seeds.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed steps of every graph and batch size.")] = 60,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 1,
    gpu: Annotated[str, typer.Option(help="What TensorRT-RTX compiles for.")] = "sm89",
    note: Annotated[str, typer.Option(help="What a reader of the numbers should know, such as other work.")] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Quantize the float twin with every peer and measure all beside our bundles."""
    wanted = peers.split(",") if peers else []
    if unknown := set(wanted) - LIBRARIES.keys():
        raise AccuQuantError(f"--peers {', '.join(sorted(unknown))}: there is {', '.join(LIBRARIES)}")
    opened = [Bundle(path) for path in bundles]
    chosen = [candidate for candidate in CANDIDATES if candidate.library in wanted]
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(opened, chosen, samples, environments.resolve(), Path(folder))
        measure(found, opened[0], n, repeats, threads, gpu, Path(folder))
    report = {
        "schema_version": 1,
        "bundle": opened[0].manifest.found,
        "steps": len(opened[0].plan),
        "n": n,
        "samples": samples,
        "repeats": repeats,
        "threads": threads or "all",
        "note": note,
        "machine": machine_facts(),
        "versions": versions(),
        "rows": {name: one.row for name, one in found.items()},
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    drawn = {name: one.row["drift"] for name, one in found.items() if name != "fp32" and "drift" in one.row}
    curves = {name: (list(range(1, len(drift) + 1)), drift) for name, drift in drawn.items()}
    figure = lines(curves, f"Distance to fp32 along the chain, n = {n}", "sampling step", "relative, median", log="y")
    write_text(out.with_suffix(".svg"), markup(figure))
    console.print(table(report))


if __name__ == "__main__":
    command(main)()
