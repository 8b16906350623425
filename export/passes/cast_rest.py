"""Give everything that is not integer 16 bits: float16, or bfloat16 where range counts more than digits.

    x -> Cast -> ... -> QuantizeLinear(s float32) -> DequantizeLinear(s float32, to 16 bits) -> ... -> Cast -> y

What depends on the latent is cast; what depends on the timestep or on a condition alone stays float32, because the
sinusoids of a timestep (or of a picture's size) need its digits, and is cast where it meets the latent. Scales stay
float32, so the integers are the same ones; only where int4 weights alone are quantized, theirs are cast too. Inputs and
output of the graph stay float32, as every engine of ours has them. Strongly typed compilers (TensorRT) take types as
they stand, and most of a step's memory traffic is in this rest.

Requires: insert_qdq has run.
Ensures: opset 23, whose QuantizeLinear takes a scale of another type and whose DequantizeLinear names its result's.
"""

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ..graph import INPUT, graph_input
from .insertion import constant, drop_unused, insert_before

OPSET = 23
TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

# Inputs that are float32 whatever the node computes in.
KEEP = {"QuantizeLinear": {1}, "DequantizeLinear": {1}, "Resize": {1, 2}}


def cast_rest(model: ir.Model, to: Literal["float16", "bfloat16"]) -> int:
    """Rewrite in place; returns how many nodes compute in 16 bits now.

    Raises:
        AccuQuantError: the graph has no latent.
    """
    dtype = TYPES[to]
    model.graph.opset_imports[""] = OPSET
    ShapeInferencePass()(model)  # what the other rewrites made has no type yet
    latent = graph_input(model, INPUT)
    cast = _Cast(model, dtype)
    depends = {latent}  # on the latent
    changed = 0
    for node in list(model.graph):
        if not depends & {value for value in node.inputs if value is not None}:
            continue
        depends |= set(node.outputs)
        if node.op_type == "DequantizeLinear":
            cast.result_of(node)
        elif node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
        elif not cast.inputs_of(node):
            continue
        changed += 1
        for value in node.outputs:
            if _is_float(value) and node.op_type != "QuantizeLinear":
                value.type = ir.TensorType(dtype)
    for index, result in enumerate(model.graph.outputs):
        if result.dtype == dtype:
            model.graph.outputs[index] = cast.back(result)
    return changed


class _Cast:
    """Makes every value and constant in 16 bits at most once."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self.model, self.dtype = model, dtype
        self.made: dict[ir.Value, ir.Value] = {}

    def inputs_of(self, node: ir.Node) -> bool:
        """Give a node its float32 inputs in 16 bits; tells whether it computes in them."""
        sixteen = False
        for index, value in enumerate(node.inputs):
            if value is None or index in KEEP.get(node.op_type, ()):
                continue
            if value.dtype == self.dtype:
                sixteen = True
            elif _is_float(value):
                node.replace_input_with(index, self._sixteen(value, node))
                drop_unused(self.model, value)
                sixteen = True
        return sixteen

    def result_of(self, dequantize: ir.Node) -> None:
        """Let a DequantizeLinear write 16 bits; compilers take int4 codes only with a scale of the same type."""
        codes, scale = dequantize.inputs[0], dequantize.inputs[1]
        if codes is not None and scale is not None and codes.dtype == ir.DataType.INT4:
            dequantize.replace_input_with(1, self._sixteen(scale, dequantize))
            drop_unused(self.model, scale)
        else:
            dequantize.attributes["output_dtype"] = ir.AttrInt64("output_dtype", self.dtype)
        value = dequantize.outputs[0]
        value.type = ir.TensorType(self.dtype)

    def back(self, result: ir.Value) -> ir.Value:
        """The graph's output, under its own name, as float32."""
        producer = result.producer()
        assert producer is not None
        node = ir.Node("", "Cast", [result], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{result.name}.float32")
        self.model.graph.insert_after(producer, node)
        wide = node.outputs[0]
        wide.shape, wide.type = result.shape, ir.TensorType(ir.DataType.FLOAT)
        wide.name, result.name = result.name, f"{result.name}.{self.dtype.name.lower()}"
        return wide

    def _sixteen(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self.made:
            name, producer = f"{value.name}.{self.dtype.name.lower()}", value.producer()
            if value.const_value is not None and value.is_initializer():
                self.made[value] = constant(self.model, name, value.const_value.numpy().astype(self.dtype.numpy()))
            elif producer is not None and producer.op_type == "DequantizeLinear" and len(value.uses()) == 1:
                self.result_of(producer)  # a weight's
                return value
            else:
                narrow = insert_before(self.model, reader, "Cast", [value], name, to=int(self.dtype))
                narrow.shape, narrow.type = value.shape, ir.TensorType(self.dtype)
                self.made[value] = narrow
        return self.made[value]


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT
