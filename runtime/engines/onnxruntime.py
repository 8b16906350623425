"""ONNX Runtime on the CPU: an engine for graphs made for it, and the reference execution of any Q/DQ graph.

`exact=True` turns every graph optimisation off, so that each Q, DQ and operator runs as the standard defines it: that
is what simulations are held against. Of a graph that was made for other targets it fuses little into integer kernels.

Its providers for NVIDIA GPUs are engines too, where onnxruntime-gpu has them: graphs for TensorRT on the TensorRT that
it loads itself, and any graph on CUDA, in float mostly. Not run on a GPU.
"""

import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from ..errors import AccuQuantError
from ..files import cache_folder
from .base import Engine, EngineOptions, Kernel, Port

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
SHORT = {"uint8": "u8", "int8": "i8", "float": "f32", "float16": "f16"}

# It would turn a MatMul and its bias into a Gemm, which has no integer kernel that writes floats.
KEPT_APART = ["MatMulAddFusion"]

_KERNEL_TIME = "_kernel_time"
_COPY = re.compile(r"(_token_\d+)+$")  # the optimiser's mark on nodes it made anew


class OnnxRuntimeEngine(Engine):
    """A graph run by ONNX Runtime's CPU provider at a fixed batch."""

    provider: ClassVar[str] = "CPUExecutionProvider"
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, path: Path, options: EngineOptions, exact: bool = False) -> None:
        super().__init__(path, options)
        where = self.provider.removesuffix("ExecutionProvider")
        self.name = f"ONNX Runtime {ort.__version__} {where}" + (" (unoptimised reference)" if exact else "")
        self._exact = exact
        self._session: Any = self._open(ort.SessionOptions())
        self.inputs = tuple(_port(p, options.batch) for p in self._session.get_inputs())
        self.outputs = tuple(_port(p, options.batch) for p in self._session.get_outputs())

    def _open(self, settings: Any) -> Any:
        settings.log_severity_level = 3
        settings.intra_op_num_threads = self.options.threads
        # Without VNNI, products of unsigned and signed codes saturate at 16 bits. Where all becomes integer kernels,
        # both are made unsigned; of other graphs ONNX Runtime 1.32 then makes nonsense - per-channel scales with one
        # zero point - so those run as they stand, in float. What nobody says is ours runs as its maker has it.
        if self.options.target == "onnxruntime":
            settings.add_session_config_entry("session.x64quantprecision", "1")
        elif self.options.target and _saturates():
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        if self._exact:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        quantized = b"QuantizeLinear" in self.path.read_bytes()
        try:
            session = ort.InferenceSession(
                self.path,
                settings,
                providers=[(self.provider, dict(self.settings))],
                disabled_optimizers=KEPT_APART if quantized else None,
            )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise AccuQuantError(f"{self.path} cannot be read by {self.name}: {error}") from error
        if session.get_providers()[0] != self.provider:  # it would go on with another, a hundred times slower
            raise AccuQuantError(f"{self.name} does not start on this machine; see accuquant-doctor")
        return session

    def _infer(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, dict(inputs))  # type: ignore[no-any-return]

    def kernels(self) -> list[Kernel]:
        """From a profile of one run on zeros; a kernel's precision is that of its first input."""
        settings = ort.SessionOptions()
        settings.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            settings.profile_file_prefix = str(Path(folder) / "profile")
            session = self._open(settings)
            session.run(None, {port.name: np.zeros(port.shape, port.dtype) for port in self.inputs})
            events = json.loads(Path(session.end_profiling()).read_text())
        return [_kernel(e) for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL_TIME)]

    def close(self) -> None:
        self._session = None


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """On an NVIDIA GPU by the CUDA provider."""

    provider = "CUDAExecutionProvider"


class OnnxRuntimeTensorRTEngine(OnnxRuntimeEngine):
    """On an NVIDIA GPU by the TensorRT provider, which keeps its engines by itself."""

    provider = "TensorrtExecutionProvider"

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        folder = str(cache_folder() / "onnxruntime-tensorrt")
        return {
            "trt_int8_enable": True, "trt_fp16_enable": True,  # explicit Q/DQ needs the permission too
            "trt_engine_cache_enable": True, "trt_engine_cache_path": folder,
        }  # fmt: skip


def _saturates() -> bool:
    """What OpenVINO's kernels do here, ONNX Runtime's do; without that library nobody can be asked, so perhaps."""
    if importlib.util.find_spec("openvino") is None:
        return True
    from .saturation import saturates

    return saturates()


def _kernel(event: dict[str, Any]) -> Kernel:
    given = event["args"]["input_type_shape"]
    dtype = next(iter(given[0]), "?") if given else "?"
    node = _COPY.sub("", event["name"].removesuffix(_KERNEL_TIME))
    return Kernel(event["args"]["op_name"], SHORT.get(dtype, dtype), (node,), float(event["dur"]))


def _port(port: Any, batch: int) -> Port:
    shape = tuple(batch if i == 0 or not isinstance(d, int) else d for i, d in enumerate(port.shape))
    if port.type not in DTYPES:
        raise AccuQuantError(f"{port.name} of the graph is {port.type}; {', '.join(DTYPES)} are known")
    return Port(port.name, np.dtype(DTYPES[port.type]), shape)
