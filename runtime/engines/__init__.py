"""Engines by name, best first. A backend is imported only when it is asked for."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import AccuQuantError
from .base import Engine, EngineOptions, Rest
from .cuda import gpu


def _openvino() -> type[Engine]:
    from .openvino import OpenVINOEngine

    return OpenVINOEngine


def _onnxruntime() -> type[Engine]:
    from .onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine


def _tensorrt() -> type[Engine]:
    from .tensorrt import TensorRTEngine

    return TensorRTEngine


def _tensorrt_rtx() -> type[Engine]:
    from .tensorrt import TensorRTRTXEngine

    return TensorRTRTXEngine


def _onnxruntime_cuda() -> type[Engine]:
    from .onnxruntime import OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine


def _onnxruntime_tensorrt() -> type[Engine]:
    from .onnxruntime import OnnxRuntimeTensorRTEngine

    return OnnxRuntimeTensorRTEngine


# Order is preference: OpenVINO runs our Q/DQ graphs wholly in int8, ONNX Runtime only those made for it.
ENGINES: dict[str, Callable[[], type[Engine]]] = {"openvino": _openvino, "onnxruntime": _onnxruntime}
# Those of graphs for TensorRT. The one that measures its kernels on the GPU comes before the one that does not.
GPU_ENGINES: dict[str, Callable[[], type[Engine]]] = {
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
    "onnxruntime-tensorrt": _onnxruntime_tensorrt,
    "onnxruntime-cuda": _onnxruntime_cuda,
}
ALL = ENGINES | GPU_ENGINES
# What is imported for each of them, the extra that installs it, and the provider that onnxruntime must have.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "rtx",
    "onnxruntime-tensorrt": "tensorrt",
    "onnxruntime-cuda": "tensorrt",
}
PROVIDERS = {"onnxruntime-tensorrt": "TensorrtExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}


def available() -> list[str]:
    """Engines that can run here, best first: those for CPUs whose library is installed; if there is a GPU, its own."""
    here = [name for name in ENGINES if importlib.util.find_spec(name) is not None]
    on_gpu = [name for name in GPU_ENGINES if has_library(name)]
    return here + (on_gpu if on_gpu and gpu() else [])


def has_library(name: str) -> bool:
    """Is a GPU engine's library installed, with all that the engine needs of it?"""
    if importlib.util.find_spec(MODULES.get(name, "onnxruntime")) is None:
        return False
    if name not in PROVIDERS:
        return True
    import onnxruntime

    return PROVIDERS[name] in onnxruntime.get_available_providers()


def open_engine(path: Path, options: EngineOptions, name: str = "auto", target: str = "") -> Engine:
    """Compile the graph at `path` with engine `name`, or with the best one installed for a bundle's `target`.

    Raises:
        AccuQuantError: unknown name, its library is not installed, or it has no `options.rest` on this machine.
    """
    return ALL[choose(name, target)]()(path, replace(options, target=target))


def rests(name: str = "auto", target: str = "") -> tuple[Rest, ...]:
    """What engine `name` can compute in here besides integers, float32 first; raises as `open_engine` does."""
    return ALL[choose(name, target)]().rests()


def choose(name: str, target: str = "") -> str:
    """The engine that `name` stands for: "auto" is the one a bundle's target is made for, or the best one installed.

    Raises:
        AccuQuantError: unknown name, or its library is not installed.
    """
    installed = available()
    if name == "auto":
        if not installed:
            raise AccuQuantError("no engine is installed; install one with: pip install 'accuquant[cpu]'")
        made_for = GPU_ENGINES if target == "tensorrt" else (target,)
        return next((name for name in made_for if name in installed), installed[0])
    if name not in ALL:
        raise AccuQuantError(f"unknown engine {name!r}; known: {', '.join(ALL)}")
    if name not in installed and name in GPU_ENGINES:
        raise AccuQuantError(
            f"engine {name} needs an NVIDIA GPU with its driver, and pip install 'accuquant[{EXTRAS[name]}]'"
        )
    if name not in installed:
        raise AccuQuantError(f"engine {name} is not installed; install it with: pip install {name}")
    return name
