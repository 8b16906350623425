"""Engines by name, best first. A backend is imported only when it is asked for."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from ..errors import AccuQuantError
from .base import Engine, EngineOptions, Rest


def _openvino() -> type[Engine]:
    from .openvino import OpenVINOEngine

    return OpenVINOEngine


def _onnxruntime() -> type[Engine]:
    from .onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine


# Order is preference: OpenVINO runs our Q/DQ graphs wholly in int8, ONNX Runtime only those made for it.
ENGINES: dict[str, Callable[[], type[Engine]]] = {"openvino": _openvino, "onnxruntime": _onnxruntime}


def available() -> list[str]:
    """Engines whose library is installed, best first."""
    return [name for name in ENGINES if importlib.util.find_spec(name) is not None]


def open_engine(path: Path, options: EngineOptions, name: str = "auto", target: str = "") -> Engine:
    """Compile the graph at `path` with engine `name`, or with the best one installed for a bundle's `target`.

    Raises:
        AccuQuantError: unknown name, its library is not installed, or it has no `options.rest` on this machine.
    """
    return ENGINES[choose(name, target)]()(path, options)


def rests(name: str = "auto", target: str = "") -> tuple[Rest, ...]:
    """What engine `name` can compute in here besides integers, float32 first; raises as `open_engine` does."""
    return ENGINES[choose(name, target)]().rests()


def choose(name: str, target: str = "") -> str:
    """The engine that `name` stands for: "auto" is the one a bundle's target is made for, or the best one installed.

    Raises:
        AccuQuantError: unknown name, or its library is not installed.
    """
    installed = available()
    if name == "auto":
        if not installed:
            raise AccuQuantError("no engine is installed; install one with: pip install 'accuquant[cpu]'")
        return target if target in installed else installed[0]
    if name not in ENGINES:
        raise AccuQuantError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    if name not in installed:
        raise AccuQuantError(f"engine {name} is not installed; install it with: pip install {name}")
    return name
