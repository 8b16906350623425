"""A graph whose rest is bfloat16, in float32 that is rounded to bfloat16: for engines that have no such kernels.

    y = f(x) in bfloat16   ->   f(x) in float32 -> Cast(bfloat16) -> Cast(float32) = y

which is what hardware does that multiplies bfloat16, adds up in float32 and writes bfloat16. No engine on a CPU runs
the graph itself: ONNX Runtime has no kernels for it, and OpenVINO 2026.4 reads its DequantizeLinear wrongly (2 dB).

Requires: cast_rest(model, "bfloat16") has run.
Ensures: no operator but Cast has a value in bfloat16; every other value of it is one that bfloat16 has.
"""

import numpy as np
import onnx_ir as ir

from .insertion import insert_behind, read_instead

# They pass on what they are given, which is rounded already.
MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip


def emulate_bfloat16(model: ir.Model) -> ir.Model:
    """The rewritten copy; `model` stays as it is."""
    model = model.clone()
    wide = ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16 and value.const_value is not None:
            values = value.const_value.numpy().astype(np.float32)
            value.const_value, value.type = ir.tensor(values, name=value.name), wide
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            node.attributes.pop("output_dtype", None)
        for value in node.outputs:
            if value.dtype != ir.DataType.BFLOAT16:
                continue
            readers = [(use.node, use.idx) for use in value.uses()]
            narrow = value
            if node.op_type != "Cast":
                value.type = wide
                if node.op_type in MOVES:
                    continue
                narrow = _cast(model, node, value, ir.DataType.BFLOAT16)
            rounded = _cast(model, narrow.producer() or node, narrow, ir.DataType.FLOAT)
            read_instead(model, value, rounded, readers)
    return model


def _cast(model: ir.Model, place: ir.Node, value: ir.Value, to: ir.DataType) -> ir.Value:
    made = insert_behind(model, place, "Cast", [value], f"{value.name}.{to.name.lower()}", to=int(to))
    made.shape, made.type = value.shape, ir.TensorType(to)
    return made
