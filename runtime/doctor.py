"""What this machine can run: each backend's library, what it would compute in here, and what would make it better."""

import ctypes.util
from dataclasses import dataclass
from importlib import metadata

from .engines import ENGINES, EXTRAS, GPU_ENGINES, MODULES, available, has_library, rests
from .engines.compile_plan import LIBRARIES
from .engines.cuda import gpu

# The instructions that multiply 8-bit integers, four to a lane; without them 8-bit products saturate.
INTEGER_INSTRUCTIONS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})


@dataclass(frozen=True)
class Finding:
    """A backend: its version or None, what it computes in on this machine, and what to do about it, if anything."""

    backend: str
    version: str | None
    computes: str
    advice: str


def examine(instructions: str) -> list[Finding]:
    """Every backend, those that run on CPUs in order of preference; `instructions` as machine_facts names them."""
    return [*(_on_cpu(name, instructions) for name in ENGINES), *(_on_gpu(name) for name in GPU_ENGINES)]


def _on_cpu(name: str, instructions: str) -> Finding:
    if name not in available():
        return Finding(name, None, "-", "pip install 'accuquant[cpu]'")
    integers = sorted(INTEGER_INSTRUCTIONS & set(instructions.split()))
    known = bool(instructions)  # of other processors than x86 nothing is read
    kinds = [f"int8 ({', '.join(integers)})" if integers else f"int8{' (emulated)' if known else ''}", *rests(name)]
    made_for = "" if name == "openvino" else "integers only of bundles made for it (--target onnxruntime)"
    slow = known and not integers
    advice = (
        "this CPU has no int8 dot product: 8-bit weights run in float, 4 and 7 bits in integers" if slow else made_for
    )
    return Finding(name, _version((name,)), ", ".join(kinds), advice)


def _on_gpu(name: str) -> Finding:
    packages = LIBRARIES[MODULES[name]].packages if name in MODULES else ("onnxruntime-gpu",)
    version, device = _version(packages) if has_library(name) else None, gpu()
    driver = ctypes.util.find_library("cuda")
    if version is None:
        advice = f"pip install 'accuquant[{EXTRAS[name]}]'" + ("" if driver else "; no NVIDIA driver is here to run it")
        return Finding(name, None, "-", advice)
    ahead = "compiles ahead of time (accuquant-build BUNDLE --gpu)" if name == "tensorrt-rtx" else "-"
    if device is None:
        missing = "no GPU that CUDA can use" if driver else "no NVIDIA driver"
        return Finding(name, version, ahead, f"{missing} is here to run plans")
    kinds = "float32, float16" if name == "onnxruntime-cuda" else "int8, int4, fp8, float16"
    return Finding(name, version, f"{kinds} on {device}", "of bundles made for it (--target tensorrt)")


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
