"""Gemm as MatMul and Add, the form whose integer kernel ONNX Runtime has without rounding the result to 8 bits.

    Gemm(x, w^T) + b   ->   Add(MatMul(x, w), b)

Requires: Gemm without factors, on constant weights (transB or not). Ensures: none is left; the MatMul keeps the name.
"""

import numpy as np
import onnx_ir as ir

from ...runtime.errors import AccuQuantError
from .insertion import constant, drop_unused, insert_behind, read_instead


def linear_as_matmul(model: ir.Model) -> int:
    """Rewrite in place; returns how many Gemm were rewritten.

    Raises:
        AccuQuantError: a Gemm with factors, a transposed input, or a weight that is not a constant; names the node.
    """
    found = [node for node in model.graph if node.op_type == "Gemm"]
    for node in found:
        _rewrite(model, node)
    return len(found)


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    weight = node.inputs[1]
    plain = [node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)] == [1.0, 1.0]
    plain &= node.attributes.get_int("transA", 0) == 0
    if not plain or weight is None or weight.const_value is None:
        raise AccuQuantError(f"linear layer {node.name}: a Gemm of a plain input and a constant weight is expected")
    values = weight.const_value.numpy()
    if node.attributes.get_int("transB", 0):
        values = np.ascontiguousarray(values.T)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product = ir.Node("", "MatMul", [node.inputs[0], constant(model, f"{node.name}.weight.transposed", values)])
    product.name = node.name
    product.metadata_props.update(node.metadata_props)
    made, old = product.outputs[0], node.outputs[0]
    made.name, made.shape, made.type = f"{node.name}.product", old.shape, old.type
    model.graph.insert_before(node, product)
    readers = list(old.uses())
    if bias is not None:
        made = insert_behind(model, product, "Add", [made, bias], f"{node.name}.with_bias")
    read_instead(model, old, made, readers)
    model.graph.remove(node, safe=True)
    drop_unused(model, weight)
