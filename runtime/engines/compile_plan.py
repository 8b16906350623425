"""Compile a graph into a plan: with TensorRT-RTX ahead of time, which needs no GPU; with TensorRT on the GPU itself.

    python -m accuquant.runtime.engines.compile_plan REQUEST.json

is the child process that does it: some graphs kill the compiler instead of being refused, and a process keeps the first
logger it was ever given. `compile_plan` starts it, and turns what became of it into a plan and its kernels.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ..errors import AccuQuantError
from ..files import write_bytes
from .rtx_log import Compiled, parse_layers, parse_log

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class Library:
    """A compiler's name for people, the packages that bring it, and the extra that installs one of them."""

    name: str
    packages: tuple[str, ...]
    extra: str


# By module. Both build strongly typed networks with explicit Q/DQ only, so one graph serves them all.
LIBRARIES: Mapping[str, Library] = {
    "tensorrt_rtx": Library("TensorRT-RTX", ("tensorrt-rtx-cu13", "tensorrt-rtx"), "rtx"),
    "tensorrt": Library("TensorRT", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt"),
}
# Which GPUs a plan can be made for; "default" is Ampere and later, in one plan.
TARGETS = ("default", "sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
# Said after every failure on a machine without a GPU; it is no reason.
NO_REASON = "CUDA driver version is insufficient"


@dataclass(frozen=True)
class CompileRequest:
    """The graph, for which GPU, and the batch sizes (least, best, most) of its dynamic first axis.

    TensorRT compiles for the GPU it runs on, whatever `target` says, and measures kernels there; what it measured is
    read from `timings` and written back, if given.
    """

    graph: Path
    target: str = "default"
    batches: tuple[int, int, int] = (1, 8, 16)
    library: str = "tensorrt_rtx"
    timings: Path | None = None


def installed(library: str = "tensorrt_rtx") -> bool:
    return importlib.util.find_spec(library) is not None


def version(library: str) -> str:
    """Name and version, as in a key: TensorRT-RTX 1.7.1.

    Raises:
        AccuQuantError: it is not installed; says how to install it.
    """
    asked = LIBRARIES[library]
    if not installed(library):
        raise AccuQuantError(f"{asked.name} is not installed; install it with: pip install 'accuquant[{asked.extra}]'")
    for package in asked.packages:
        try:
            return f"{asked.name} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return asked.name


def compile_plan(request: CompileRequest, out: Path | None = None, *, seconds: float = 600) -> Compiled:
    """Compile in a child process, write the plan to `out` if wanted, and tell what was compiled.

    Raises:
        AccuQuantError: the library is not installed, or it refused the graph (its own words are given), crashed, or
            took longer than `seconds`.
    """
    version(request.library)
    compiler = LIBRARIES[request.library].name
    if request.library == "tensorrt_rtx" and request.target not in TARGETS:
        raise AccuQuantError(f"unknown GPU target {request.target!r}; known: {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        asked, told, plan = (Path(folder) / name for name in ("request.json", "told.json", "plan"))
        asked.write_text(
            json.dumps(
                {
                    "graph": str(request.graph.resolve()),
                    "target": request.target,
                    "batches": request.batches,
                    "library": request.library,
                    "timings": request.timings and str(request.timings.resolve()),
                    "told": str(told),
                    "plan": str(plan if out is None else out),
                }
            )
        )
        try:
            child = subprocess.run(
                [sys.executable, "-m", __name__, str(asked)], capture_output=True, text=True, check=False,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise AccuQuantError(f"{request.graph.name}: {compiler} took longer than {seconds:.0f} s") from error
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            raise AccuQuantError(f"{request.graph.name}: {compiler} crashed ({name}) for {request.target}")
        if not told.exists():
            raise AccuQuantError(f"{request.graph.name}: {compiler} did not start: {child.stderr.strip()[-500:]}")
        answer = json.loads(told.read_text())
    if answer["refused"]:
        raise AccuQuantError(f"{request.graph.name}: {compiler} refused it for {request.target}: {answer['refused']}")
    return parse_layers(answer["layers"]) if answer["layers"] else parse_log(answer["log"])


def _build(asked: dict[str, Any]) -> dict[str, str]:
    """In the child: compile, write the plan; return the log or the plan's layers, or why there is no plan."""
    trt: Any = importlib.import_module(asked["library"])

    rows: list[tuple[Any, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            rows.append((severity, message))

    def refused(reasons: Sequence[str]) -> dict[str, str]:
        said = [line.strip() for reason in reasons for line in reason.splitlines() if NO_REASON not in line]
        return {"refused": "; ".join(dict.fromkeys(said)) or "no reason given", "log": "", "layers": ""}

    log = Log()
    builder: tensorrt.Builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(asked["graph"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return refused([f"node {e.node_name()}: {_reason(e)}" for e in errors])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if asked["library"] == "tensorrt_rtx" and asked["target"] != "default":
        named: Any = config  # TensorRT's has none of the following
        named.num_compute_capabilities = 1
        named.set_compute_capability(getattr(trt.ComputeCapability, asked["target"].upper()), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        port = network.get_input(i)
        if -1 in tuple(port.shape):
            profile.set_shape(port.name, *(tuple(b if d == -1 else d for d in port.shape) for b in asked["batches"]))
    config.add_optimization_profile(profile)
    timings = Path(asked["timings"]) if asked["timings"] else None
    if timings is not None:
        known = timings.read_bytes() if timings.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    plan = builder.build_serialized_network(network, config)
    failures = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
    if plan is None:
        return refused([message for severity, message in rows if severity in failures])
    with Path(asked["plan"]).open("wb") as file:
        file.write(plan)  # as it lies in memory: a plan can be gigabytes
    if timings is not None:
        measured = config.get_timing_cache()
        with FileLock(timings.with_suffix(".lock")):  # builders of other graphs measure at the same time
            if timings.exists():
                measured.combine(config.create_timing_cache(timings.read_bytes()), False)
            write_bytes(timings, bytes(measured.serialize()))
    layers = "" if asked["library"] == "tensorrt_rtx" else _layers(trt, log, plan)
    return {"refused": "", "log": "\n".join(message for _, message in rows), "layers": layers}


def _reason(error: Any) -> str:
    """Why the parser stopped; of an operator that it does not know it says `false`, and no more."""
    said: str = error.desc()
    return f"{error.node_operator()} is not supported" if said == "false" else said


def _layers(trt: Any, log: Any, plan: Any) -> str:
    """A finished plan's kernels as JSON, which takes the GPU it was made for."""
    runtime: tensorrt.Runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = _build(request)
    Path(request["told"]).write_text(json.dumps(answer))
