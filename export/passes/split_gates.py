"""Take a linear layer whose result is cut into pieces apart into one linear layer for each piece.

    Linear -> Split (value, gate) -> value * gelu(gate)   =>   Linear -> value,  Linear -> gelu(gate)

as in the feed-forward layers of latent diffusion. A compiler for CPUs copies the pieces of a whole result, which is
wider than anything else in those networks; a part's own kernel writes its piece where it is read, and takes what comes
next with it (linear_parts.py).

Requires: of a quantized graph, that store_weights and insert_qdq have run; time_table and cast_rest have not.
Ensures: layers of tokens, (B, N, C), are apart; of others, such as one modulation for all tokens, the cut costs less
than kernels of their own.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...calibrate.recipe import Recipe
from ..graph import operator_node, operator_nodes
from .insertion import read_instead
from .linear_parts import can_be_cut, numbers, only_reader, parts, whole


def split_gates(model: ir.Model, recipe: Recipe) -> int:
    """Rewrite in place; returns how many layers were taken apart.

    Raises:
        AccuQuantError: a layer of the recipe is not in the graph, or the weight of one that is to be taken apart is
            computed there.
    """
    nodes, apart = operator_nodes(model), 0
    for name, operator in recipe.facts.operators.items():
        if operator.kind == "linear":
            apart += _rewrite(model, operator_node(nodes, name))
    if apart:
        RemoveUnusedNodesPass()(model)
    return apart


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    layer = whole(node)
    split = only_reader(layer.result) if layer is not None else None
    if layer is None or split is None or not _cuts_columns(split, layer.result):
        return False
    pieces = list(split.outputs)
    if not can_be_cut(layer, len(pieces)):
        return False
    for piece, value in zip(pieces, parts(model, layer, len(pieces), split), strict=True):
        read_instead(model, piece, value, list(piece.uses()))
    return True


def _cuts_columns(split: ir.Node, result: ir.Value) -> bool:
    """Is it a Split of tokens along their last axis into pieces of one size?"""
    rank = len(result.shape or ())
    if split.op_type != "Split" or rank < 3 or split.attributes.get_int("axis", 0) not in (-1, rank - 1):
        return False
    sizes = numbers(split, 1)
    return len(split.outputs) > 1 and (sizes is None or len(set(sizes.tolist())) == 1)
