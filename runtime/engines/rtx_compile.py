"""Compile a graph for NVIDIA GPUs ahead of time with TensorRT-RTX: no GPU is needed, and none is touched.

    python -m accuquant.runtime.engines.rtx_compile REQUEST.json

is the child process that does it: some graphs kill the compiler instead of being refused, and a process keeps the first
logger it was ever given. `compile_plan` starts it, and turns what became of it into a plan and its kernels.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AccuQuantError
from .rtx_log import Compiled, parse_log

LIBRARY = "tensorrt_rtx"
PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx")
# Which GPUs a plan can be made for; "default" is Ampere and later, in one plan.
TARGETS = ("default", "sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
# Said after every failure on a machine without a GPU; it is no reason.
NO_REASON = "CUDA driver version is insufficient"


@dataclass(frozen=True)
class CompileRequest:
    """The graph, for which GPU, and the batch sizes (least, best, most) of its dynamic first axis."""

    graph: Path
    target: str = "default"
    batches: tuple[int, int, int] = (1, 8, 16)


def installed() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


def compile_plan(request: CompileRequest, out: Path | None = None, *, seconds: float = 600) -> Compiled:
    """Compile in a child process, write the plan to `out` if wanted, and tell what was compiled.

    Raises:
        AccuQuantError: the library is not installed, or it refused the graph (its own words are given), crashed, or
            took longer than `seconds`.
    """
    if not installed():
        raise AccuQuantError("TensorRT-RTX is not installed; install it with: pip install 'accuquant[rtx]'")
    if request.target not in TARGETS:
        raise AccuQuantError(f"unknown GPU target {request.target!r}; known: {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as folder:
        asked, told, plan = (Path(folder) / name for name in ("request.json", "told.json", "plan"))
        asked.write_text(
            json.dumps(
                {
                    "graph": str(request.graph.resolve()),
                    "target": request.target,
                    "batches": request.batches,
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
            raise AccuQuantError(f"{request.graph.name}: TensorRT-RTX took longer than {seconds:.0f} s") from error
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            raise AccuQuantError(f"{request.graph.name}: TensorRT-RTX crashed ({name}) for {request.target}")
        if not told.exists():
            raise AccuQuantError(f"{request.graph.name}: TensorRT-RTX did not start: {child.stderr.strip()[-500:]}")
        answer = json.loads(told.read_text())
    if answer["refused"]:
        raise AccuQuantError(f"{request.graph.name}: TensorRT-RTX refused it for {request.target}: {answer['refused']}")
    return parse_log(answer["log"])


def _build(asked: dict[str, Any]) -> dict[str, str]:
    """In the child: compile, write the plan, return the log and, if there is no plan, why."""
    import tensorrt_rtx as trt

    rows: list[tuple[Any, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            rows.append((severity, message))

    def refused(reasons: Sequence[str]) -> dict[str, str]:
        said = [r for r in reasons if NO_REASON not in r]
        return {"refused": "; ".join(dict.fromkeys(said)) or "no reason given", "log": ""}

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(asked["graph"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return refused([f"node {e.node_name()}: {e.desc()}" for e in errors])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if asked["target"] != "default":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, asked["target"].upper()), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        port = network.get_input(i)
        if -1 in tuple(port.shape):
            profile.set_shape(port.name, *(tuple(b if d == -1 else d for d in port.shape) for b in asked["batches"]))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    failures = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
    if plan is None:
        return refused([message for severity, message in rows if severity in failures])
    with Path(asked["plan"]).open("wb") as file:
        file.write(plan)  # as it lies in memory: a plan can be gigabytes
    return {"refused": "", "log": "\n".join(message for _, message in rows)}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = _build(request)
    Path(request["told"]).write_text(json.dumps(answer))
