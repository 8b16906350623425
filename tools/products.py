"""How much a network multiplies, and how fast this CPU multiplies at best."""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
from accuquant.runtime.engines.base import EngineOptions, Rest
from accuquant.runtime.engines.openvino import OpenVINOEngine
from onnx import TensorProto, helper

SIDE = 1024  # of the large product's matrices
RUNS = 30


def multiplications(graph: Path) -> int:
    """Of convolutions and matrix products, one sample's, counted on the graph's shapes."""
    model = ov.Core().read_model(graph)
    model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
    found = 0
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind == "Convolution":
            inner = int(np.prod(op.input_value(1).get_shape()[1:]))
        elif kind == "MatMul":
            inner = op.input_value(0).get_shape()[-2 if op.get_attributes()["transpose_a"] else -1]
        else:
            continue
        found += int(np.prod(op.get_output_shape(0))) * inner
    return found


def large_product(threads: int) -> dict[str, float]:
    """Operations per second (a multiplication and an addition are two) of one product of SIDE^3, by OpenVINO.

    In float32, in bfloat16 where the CPU has it, and in 8 bits, as our graphs write it; the best of some runs.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as made:
        plain, quantized = Path(made) / "float.onnx", Path(made) / "int8.onnx"
        weight = rng.standard_normal((SIDE, SIDE)).astype(np.float32)
        onnx.save(_graph({"w": weight}, []), plain)
        codes = np.clip(np.rint(weight * 32), -127, 127).astype(np.int8)
        held = {
            "codes": codes, "fine": np.full(SIDE, 1 / 32, np.float32), "none": np.zeros(SIDE, np.int8),
            "scale": np.array(1 / 32, np.float32), "zero": np.array(128, np.uint8),
        }  # fmt: skip
        quantizers = [
            helper.make_node("DequantizeLinear", ["codes", "fine", "none"], ["w"], axis=1),
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        ]
        onnx.save(_graph(held, quantizers, "d"), quantized)
        rests = OpenVINOEngine.rests()
        found = {"float32": _rate(plain, threads, "float32"), "int8": _rate(quantized, threads, "float32")}
        return found | ({"bfloat16": _rate(plain, threads, "bfloat16")} if "bfloat16" in rests else {})


def _graph(held: dict[str, np.ndarray], before: list[onnx.NodeProto], left: str = "x") -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIDE]) for name in ("x", "y")]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    nodes = [*before, helper.make_node("MatMul", [left, "w"], ["y"])]
    made = helper.make_graph(nodes, "product", ports[:1], ports[1:], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _rate(graph: Path, threads: int, rest: Rest) -> float:
    engine = OpenVINOEngine(graph, EngineOptions(SIDE, threads, rest))
    x = {"x": np.random.default_rng(1).standard_normal((SIDE, SIDE)).astype(np.float32)}
    taken = []
    for _ in range(RUNS):
        begun = time.process_time()
        engine.run(x)
        taken.append(time.process_time() - begun)
    engine.close()
    return 2 * SIDE**3 / min(taken)
