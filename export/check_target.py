"""Does a lowered graph keep its target's rules? A lint that names the node, the rule and the repair.

Both inputs of a quantized operator come from DequantizeLinear, through Reshape or Transpose at most; what else must
hold is in target_rules.py. A graph is checked when it is lowered and once more as it will be written, because looking
values up and casting them can break what held before.
"""

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from ..calibrate.scheme import TargetName
from ..runtime.errors import AccuQuantError, near
from .graph import operator_nodes, operator_parts
from .operands import came_from, operand
from .target_rules import NODE_RULES, RULES, Violation

SHOWN = 3


def check_target(
    model: ir.Model,
    operators: Iterable[str],
    target: TargetName,
    *,
    weights_alone: bool = False,
    looked_up: bool = False,
) -> None:
    """Check every quantized operator of a lowered graph; of those whose `weights_alone` are quantized, the weights.

    Of a graph with a table of timesteps (`looked_up`), those that are still computed.

    Raises:
        AccuQuantError: rules are broken; the first few are named, with their repairs.
    """
    if looked_up:
        left = operator_nodes(model).keys()
        operators = [name for name in operators if name in left]
    found = violations(model, operators, target, weights_alone=weights_alone)
    if found:
        more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
        told = ". ".join(str(v) for v in found[:SHOWN])
        raise AccuQuantError(f"the graph breaks the rules of target {target}: {told}{more}")


def violations(
    model: ir.Model, operators: Iterable[str], target: TargetName, *, weights_alone: bool = False
) -> list[Violation]:
    """All broken rules, in the operators' order; one of an operand at most."""
    nodes = operator_nodes(model)
    found: list[Violation] = []
    for name in operators:
        if name not in nodes:
            rule = f"no node of that name ({near(name, nodes)})"
            found.append(Violation(name, rule, "recipe and checkpoint do not fit: export what was calibrated"))
            continue
        for part in (*operator_parts(nodes, name), f"{name}.second"):  # of an operator that was taken apart
            if part in nodes:
                found += _of_node(nodes[part], target, (1,) if weights_alone else (0, 1))
    return found


def _of_node(node: ir.Node, target: TargetName, indices: Iterable[int]) -> Iterator[Violation]:
    for index in indices:
        place = operand(node, index)
        if place is None:
            producer = came_from(node, index)
            came = "a constant or graph input" if producer is None else f"{producer.op_type} {producer.name}"
            rule = f"comes from {came}, not from DequantizeLinear"
            yield Violation(f"{node.name}, input {index}", rule, "put Q/DQ directly before the operator")
            continue
        yield from next((broken for rule in RULES[target] if (broken := list(rule(place)))), [])
    for node_rule in NODE_RULES[target]:
        yield from node_rule(node)
