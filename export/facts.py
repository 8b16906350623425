"""What a bundle says of itself: what became of every operator, and which libraries had a hand in it."""

from importlib import metadata

import onnx_ir as ir

from ..calibrate.recipe import ActivationRecipe, Recipe
from ..runtime.bundle import IN_TABLE, OperatorFacts
from .graph import operator_nodes


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


def _grid_name(facts: ActivationRecipe) -> str:
    if facts.number == "float8":
        return "fp8"
    return f"{'int' if facts.signed else 'uint'}{facts.bits}"
