"""OpenVINO on the CPU: the default engine, because it fuses our Q/DQ graph wholly into int8 kernels.

The graph is read as it is, with three changes: 4-bit weight constants are widened to int8, same values - there is no
4-bit arithmetic on CPUs, and left at 4 bits OpenVINO decompresses such weights and computes in float; signed codes are
kept from a fusion that loses their sign; and on CPUs whose integer products saturate, operators that could get there
are kept out of its fusion (saturation.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ..errors import AccuQuantError
from .base import Engine, EngineOptions, Kernel, Port, Rest
from .saturation import SATURATES, keep_out, leave_alone

ELEMENTWISE = frozenset({"Clamp", "Maximum", "Minimum", "Multiply", "Relu"})  # through which a Concat is seen


class OpenVINOEngine(Engine):
    """A graph compiled by OpenVINO for the CPU at a fixed batch."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        super().__init__(path, options)
        self.name = f"OpenVINO {ov.__version__.split('-')[0]} CPU"
        core = ov.Core()
        try:
            self._compile(core)
        except Exception as error:  # of reading, and of arrays by the shapes that were read
            raise AccuQuantError(f"{path} cannot be read by {self.name}: {_first_line(error)}") from error

    def _compile(self, core: Any) -> None:
        options, model = self.options, core.read_model(self.path)
        if any(_in_bfloat16(op) for op in model.get_ordered_ops()):
            raise ValueError("it computes in bfloat16, which this engine gets wrong; it is for TensorRT on a GPU")
        widen_int4(model)
        keep_signs(model)
        self.kept_in_float = dict.fromkeys(keep_out(model), SATURATES)
        model.reshape({port: [options.batch, *list(port.partial_shape)[1:]] for port in model.inputs})
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[options.rest],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # of float layers with int8 weights, which nobody calibrated
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "PERF_COUNT": options.profile,
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        self._compiled: Any = core.compile_model(model, "CPU", settings)
        self._request: Any = self._compiled.create_infer_request()
        # An input's tensor may bear other names too, of nodes that changed nothing and are gone.
        self.inputs = tuple(_port(p, p.get_node().get_friendly_name()) for p in self._compiled.inputs)
        self.outputs = tuple(_port(p, p.get_any_name()) for p in self._compiled.outputs)
        # Shared buffers: the loop writes into them and the engine reads them where they lie.
        self._buffers = {port.name: np.zeros(port.shape, port.dtype) for port in self.inputs}
        for port, raw in zip(self.inputs, self._compiled.inputs, strict=True):
            self._request.set_tensor(raw, ov.Tensor(self._buffers[port.name], shared_memory=True))

    @classmethod
    def rests(cls) -> tuple[Rest, ...]:
        native = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("float32", "bfloat16") if "BF16" in native else ("float32",)

    def _infer(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for name, value in inputs.items():
            np.copyto(self._buffers[name], value)
        self._request.infer()
        return [self._request.get_output_tensor(n).data for n in range(len(self.outputs))]

    def kernels(self) -> list[Kernel]:
        taken = {}
        if self.options.profile:
            taken = {e.node_name: e.real_time.total_seconds() * 1e6 for e in self._request.get_profiling_info()}
        found = []
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = {k: v.astype(str) for k, v in op.get_rt_info().items()}
            original = info.get("originalLayersNames", "")
            # Of a kernel that unpacks integer weights while it multiplies in float, only the primitive tells.
            in_float = info.get("primitiveType", "").endswith("_f32")
            found.append(
                Kernel(
                    kind=info.get("layerType", op.get_type_name()),
                    precision="f32" if in_float else info.get("runtimePrecision", "?"),
                    nodes=tuple(name for name in original.split(",") if name),
                    microseconds=taken.get(op.get_friendly_name()),
                )
            )
        return found

    def close(self) -> None:
        self._request = self._compiled = None


def _in_bfloat16(op: Any) -> bool:
    return op.get_type_name() != "Convert" and any(o.get_element_type() == ov.Type.bf16 for o in op.outputs())


def keep_signs(model: Any) -> int:
    """Put a node that changes nothing before signed quantizers behind a Concat; returns how many.

    OpenVINO 2026.4 moves such a quantizer into the Concat and loses the codes' sign, but on CPUs with AMX. Graphs for
    the cpu target have none; those for TensorRT have.
    """
    found = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "FakeQuantize" or np.min(op.input_value(3).get_node().data) >= 0:
            continue
        above = op.input_value(0).get_node()
        while above.get_type_name() in ELEMENTWISE:
            above = above.input_value(0).get_node()
        if above.get_type_name() == "Concat":
            leave_alone(op)
            found += 1
    return found


def widen_int4(model: Any) -> int:
    """Replace every 4-bit constant of an OpenVINO model by an int8 one of the same values; returns how many."""
    widened = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_element_type() != ov.Type.i4:
            continue
        wide = ov.op.Constant(unpack_int4(np.asarray(op.data), list(op.get_output_shape(0))))
        wide.set_friendly_name(op.get_friendly_name())
        for target in op.output(0).get_target_inputs():
            target.replace_source_output(wide.output(0))
        widened += 1
    return widened


def unpack_int4(packed: np.ndarray, shape: list[int]) -> np.ndarray:
    """Signed 4-bit values, two to a byte, low half first, as int8 of `shape`."""
    raw = packed.view(np.uint8).ravel()
    halves = np.stack([raw & 0xF, raw >> 4], axis=1).ravel()[: int(np.prod(shape))].astype(np.int8)
    return np.where(halves > 7, halves - 16, halves).astype(np.int8).reshape(shape)


def _port(port: Any, name: str) -> Port:
    return Port(name, port.get_element_type().to_dtype(), tuple(port.shape))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
