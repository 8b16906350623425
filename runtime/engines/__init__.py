"""Engines by name, best first. A backend is imported only when it is asked for."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from ..errors import AccuQuantError
from .base import Engine, EngineOptions


def _openvino(path: Path, options: EngineOptions) -> Engine:
    from .openvino import OpenVINOEngine

    return OpenVINOEngine(path, options)


def _onnxruntime(path: Path, options: EngineOptions) -> Engine:
    from .onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, options)


# Order is preference: OpenVINO runs our Q/DQ graphs wholly in int8, ONNX Runtime mostly in float.
ENGINES: dict[str, Callable[[Path, EngineOptions], Engine]] = {"openvino": _openvino, "onnxruntime": _onnxruntime}


def available() -> list[str]:
    """Engines whose library is installed, best first."""
    return [name for name in ENGINES if importlib.util.find_spec(name) is not None]


def open_engine(path: Path, options: EngineOptions, name: str = "auto") -> Engine:
    """Compile the graph at `path` with engine `name`, or with the best one installed.

    Raises:
        AccuQuantError: unknown name, or its library is not installed.
    """
    installed = available()
    if name == "auto":
        if not installed:
            raise AccuQuantError("no engine is installed; install one with: pip install 'accuquant[cpu]'")
        name = installed[0]
    if name not in ENGINES:
        raise AccuQuantError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    if name not in installed:
        raise AccuQuantError(f"engine {name} is not installed; install it with: pip install {name}")
    return ENGINES[name](path, options)
