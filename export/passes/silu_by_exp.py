"""SiLU written out, which OpenVINO computes faster than its own.

    y sigmoid(y)   =>   y / (1 + exp(-y))

OpenVINO makes one operator of the left form, which takes the exponential of -|y|, chooses between two quotients and
multiplies; the right form has fewer instructions. Between a norm and a quantizer, where a U-Net has them, SiLU is most
of what is not a product.

A SiLU that stands behind a product is left as it is, because compilers compute it in the product's own kernel.

Requires: Sigmoid and Mul of one value, as torch exports SiLU.
Ensures: equal up to float32 rounding, also where exp(-y) overflows: the quotient is then 0.
"""

import numpy as np
import onnx_ir as ir

from .insertion import constant, insert_before, read_instead

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})


def silu_by_exp(model: ir.Model) -> int:
    """Rewrite in place; returns how many were rewritten."""
    rewritten = 0
    for sigmoid in [node for node in model.graph if node.op_type == "Sigmoid"]:
        y, gate = sigmoid.inputs[0], sigmoid.outputs[0]
        uses = list(gate.uses())
        if y is None or _behind_product(y) or len(uses) != 1 or gate.is_graph_output():
            continue
        silu = uses[0].node
        if silu.op_type == "Mul" and set(silu.inputs) == {y, gate}:
            _rewrite(model, sigmoid, silu, y)
            rewritten += 1
    return rewritten


def _behind_product(y: ir.Value) -> bool:
    """Is y a product, or one with a bias added?"""
    producer = y.producer()
    if producer is not None and producer.op_type == "Add":
        return any(x is not None and _is_product(x.producer()) for x in producer.inputs)
    return _is_product(producer)


def _is_product(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in PRODUCTS


def _rewrite(model: ir.Model, sigmoid: ir.Node, silu: ir.Node, y: ir.Value) -> None:
    name, old = silu.name or str(silu.outputs[0].name), silu.outputs[0]

    def fixed(title: str, value: float) -> ir.Value:
        return constant(model, f"{name}.{title}", np.full((), value, np.float32))

    def node(op: str, title: str, *inputs: ir.Value) -> ir.Value:
        return insert_before(model, silu, op, inputs, title)

    negated = node("Mul", f"{name}.negated", y, fixed("minus_one", -1))
    below = node("Add", f"{name}.below", node("Exp", f"{name}.power", negated), fixed("one", 1))
    read_instead(model, old, node("Div", name, y, below), list(old.uses()))
    model.graph.remove([silu, sigmoid], safe=True)
