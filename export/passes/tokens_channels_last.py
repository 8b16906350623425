"""Pictures to tokens and back in channels-last order, in which compilers for CPUs keep pictures in memory.

    (B, C, H, W) -> Reshape (B, C, HW)                      =>   Transpose (B, H, W, C) -> Reshape (B, HW, C) -> T
    T -> (B, C, HW) -> Reshape (B, C, H, W)                 =>   Reshape (B, H, W, C) -> Transpose (B, C, H, W)

T swaps the last two axes, and two of them in a row are none. The Transposes of the right side move nothing where a
picture lies channels-last; the Reshapes of the left side force it into channels-first, and attention, which wants
tokens by rows, then moves it back.

Requires: C, H and W known; quantizers not inserted yet.
Ensures: the same numbers in the same places for every reader. A Reshape of what is no convolution's result, or that is
read by others than swaps and products, is as it was.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .insertion import constant, insert_before, read_instead

SWAP = (0, 2, 1)  # tokens to channels and back


def tokens_channels_last(model: ir.Model) -> int:
    """Rewrite in place; returns how many Reshapes were rewritten."""
    found = [node for node in model.graph if node.op_type == "Reshape"]
    return sum(_to_tokens(model, node) or _to_picture(model, node) for node in found)


def _to_tokens(model: ir.Model, node: ir.Node) -> bool:
    x, tokens = node.inputs[0], node.outputs[0]
    sides = _picture(x)
    if not _is_convolved(x) or x is None or sides is None or _known(tokens) != (sides[0], sides[1] * sides[2]):
        return False
    readers = list(tokens.uses())
    swaps = [use for use in readers if _swaps(use.node)]
    others = [use for use in readers if use.node.op_type == "MatMul"]
    if tokens.is_graph_output() or len(swaps) + len(others) < len(readers):
        return False
    channels, height, width = sides
    last = insert_before(model, node, "Transpose", [x], f"{node.name}.last", perm=(0, 2, 3, 1))
    rows = insert_before(
        model, node, "Reshape", [last, _sizes(model, node, (height * width, channels))], f"{node.name}.rows"
    )
    rows.shape = ir.Shape([tokens.shape[0], height * width, channels])  # type: ignore[index]
    for use in swaps:
        old = use.node.outputs[0]
        read_instead(model, old, rows, list(old.uses()))
        model.graph.remove(use.node, safe=True)
    if others:
        back = insert_before(model, node, "Transpose", [rows], f"{node.name}.columns", perm=SWAP)
        back.shape = tokens.shape
        read_instead(model, tokens, back, [(use.node, use.idx) for use in others])
    model.graph.remove(node, safe=True)
    return True


def _to_picture(model: ir.Model, node: ir.Node) -> bool:
    columns, picture = node.inputs[0], node.outputs[0]
    sides = _picture(picture)
    swap = columns.producer() if columns is not None else None
    if sides is None or swap is None or not _swaps(swap) or _known(columns) != (sides[0], sides[1] * sides[2]):
        return False
    channels, height, width = sides
    rows = swap.inputs[0]
    last = insert_before(
        model, node, "Reshape", [rows, _sizes(model, node, (height, width, channels))], f"{node.name}.last"
    )
    made = insert_before(model, node, "Transpose", [last], f"{node.name}.picture", perm=(0, 3, 1, 2))
    made.shape = picture.shape
    read_instead(model, picture, made, list(picture.uses()))
    model.graph.remove(node, safe=True)
    if not swap.outputs[0].uses() and not swap.outputs[0].is_graph_output():
        model.graph.remove(swap, safe=True)
    return True


def _known(value: ir.Value | None) -> tuple[int, ...] | None:
    """All sides but the first; None if they are not known."""
    sides = tuple(value.shape)[1:] if value is not None and value.shape is not None else ()
    return sides if sides and all(isinstance(side, int) for side in sides) else None  # type: ignore[return-value]


def _picture(value: ir.Value | None) -> tuple[int, int, int] | None:
    sides = _known(value)
    return sides if sides is not None and len(sides) == 3 else None


def _is_convolved(value: ir.Value | None) -> bool:
    """Is it a picture indeed, and not tokens in heads?"""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Conv"


def _swaps(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == SWAP


def _sizes(model: ir.Model, node: ir.Node, sides: Sequence[int]) -> ir.Value:
    return constant(model, f"{node.name}.sides", np.array([-1, *sides]))
