"""What this machine can run: each backend's library, what it would compute in here, and what would make it better."""

import ctypes.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from .engines import ENGINES, available, rests
from .engines.rtx_compile import PACKAGES as RTX_PACKAGES
from .engines.rtx_compile import installed as rtx_installed

# The instructions that multiply 8-bit integers, four to a lane; without them int8 is no faster than fp32.
INTEGER_INSTRUCTIONS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
GPU_LIBRARIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "tensorrt": (("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt"),
    "tensorrt-rtx": (RTX_PACKAGES, "rtx"),
}


@dataclass(frozen=True)
class Finding:
    """A backend: its version or None, what it computes in on this machine, and what to do about it, if anything."""

    backend: str
    version: str | None
    computes: str
    advice: str


def examine(instructions: str) -> list[Finding]:
    """Every backend, those that run on CPUs in order of preference; `instructions` as machine_facts names them."""
    return [*(_on_cpu(name, instructions) for name in ENGINES), *(_on_gpu(name) for name in GPU_LIBRARIES)]


def _on_cpu(name: str, instructions: str) -> Finding:
    if name not in available():
        return Finding(name, None, "-", "pip install 'accuquant[cpu]'")
    integers = sorted(INTEGER_INSTRUCTIONS & set(instructions.split()))
    known = bool(instructions)  # of other processors than x86 nothing is read
    kinds = [f"int8 ({', '.join(integers)})" if integers else f"int8{' (emulated)' if known else ''}", *rests(name)]
    made_for = "" if name == "openvino" else "integers only of bundles made for it (--target onnxruntime)"
    slow = known and not integers
    advice = "this CPU has no int8 dot product: expect smaller files and no more speed" if slow else made_for
    return Finding(name, _version((name,)), ", ".join(kinds), advice)


def _on_gpu(name: str) -> Finding:
    packages, extra = GPU_LIBRARIES[name]
    version, driver = _version(packages), ctypes.util.find_library("cuda")
    if version is None:
        advice = f"pip install 'accuquant[{extra}]'" + ("" if driver else "; no NVIDIA driver is here to run it")
        return Finding(name, None, "-", advice)
    if name == "tensorrt-rtx" and rtx_installed():
        computes = "compiles ahead of time (accuquant-build BUNDLE --gpu)"
        return Finding(name, version, computes, "this release does not run plans yet")
    return Finding(name, version, "-", "this release does not run plans yet")


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
