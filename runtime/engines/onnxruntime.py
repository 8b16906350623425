"""ONNX Runtime on the CPU: the reference execution of a Q/DQ graph, and the fallback where OpenVINO is missing.

`exact=True` turns every graph optimisation off, so that each Q, DQ and operator runs as the standard defines it: that
is what simulations are held against. It fuses few of our nodes into integer kernels and is not a fast engine for them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import AccuQuantError
from .base import Engine, EngineOptions, Kernel, Port

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OnnxRuntimeEngine(Engine):
    """A graph run by ONNX Runtime's CPU provider at a fixed batch."""

    def __init__(self, path: Path, options: EngineOptions, exact: bool = False) -> None:
        super().__init__(path, options)
        self.name = f"ONNX Runtime {ort.__version__} CPU" + (" (unoptimised reference)" if exact else "")
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = options.threads
        if exact:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session: Any = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise AccuQuantError(f"{path} cannot be read by {self.name}: {error}") from error
        self.inputs = tuple(_port(p, options.batch) for p in self._session.get_inputs())
        self.outputs = tuple(_port(p, options.batch) for p in self._session.get_outputs())

    def _infer(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, dict(inputs))  # type: ignore[no-any-return]

    def kernels(self) -> list[Kernel]:
        return []

    def close(self) -> None:
        self._session = None


def _port(port: Any, batch: int) -> Port:
    shape = tuple(batch if i == 0 or not isinstance(d, int) else d for i, d in enumerate(port.shape))
    return Port(port.name, np.dtype(DTYPES[port.type]), shape)
