"""What a bundle says of itself: what became of every operator, and which libraries had a hand in it."""

from collections.abc import Callable
from importlib import metadata

import onnx_ir as ir
from torch import nn

from ..calibrate.layers import QUANTIZABLE, UNQUANTIZABLE, QuantizedOperator
from ..calibrate.recipe import ActivationRecipe, Recipe
from ..calibrate.scheme import QuantScheme, Role
from ..runtime.bundle import IN_TABLE, OperatorFacts
from .graph import operator_nodes
from .tuning import Tuning


def versions() -> dict[str, str]:
    """Installed versions of everything that had a hand in the artifact."""
    names = ("accuquant", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def operator_facts(recipe: Recipe, graph: ir.Model) -> dict[str, OperatorFacts]:
    """What became of every operator; those that are no node of the graph any more are in its table of timesteps."""
    facts, nodes = {}, operator_nodes(graph)
    for name, operator in recipe.facts.operators.items():
        codes = recipe.codes.get(name)
        count = 0 if codes is None else codes.numel()
        container = (recipe.container(name) or "-") if name in nodes else IN_TABLE
        facts[name] = OperatorFacts(
            kind=operator.kind,
            role=operator.role,
            weight_bits=operator.weight_bits,
            weight_container=container,
            inputs=tuple(_grid_name(i) for i in operator.inputs),
            output=None if operator.output is None else _grid_name(operator.output),
            parameters=count,
            stored_bytes={"int4": (count + 1) // 2, IN_TABLE: 0}.get(container, count),
        )
    return facts


def left_in_float(
    network: nn.Module,
    scheme: QuantScheme,
    role_of: Callable[[str], Role],
    graph: ir.Model,
    tuning: Tuning | None = None,
) -> dict[str, str]:
    """Operators of the graph that could be quantized and are not, and why; a quantized network's, in its order."""
    nodes, found = operator_nodes(graph), dict[str, str]()
    quantized = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, QuantizedOperator))
    for name, module in network.named_modules():
        if not isinstance(module, QUANTIZABLE + UNQUANTIZABLE) or name not in nodes or name.startswith(quantized):
            continue
        role = role_of(name)
        if scheme.nothing_quantized:
            found[name] = scheme.described
        elif patterns := scheme.left_out(name):
            tuned = tuning is not None and name in tuning.in_float
            found[name] = "measured to be faster so (--tune)" if tuned else f"asked for (--in-float {patterns[0]})"
        elif role == "attention":
            found[name] = f"{scheme.target} has no faster kernel for attention's products in {scheme.name}"
        else:
            found[name] = f"policy {scheme.policy}: {role} operators stay in float"
    return found


def _grid_name(facts: ActivationRecipe) -> str:
    if facts.number == "float8":
        return "fp8"
    return f"{'int' if facts.signed else 'uint'}{facts.bits}"
