"""The float network as an ONNX graph, every quantizable node named after its module.

torch.onnx's dynamo exporter, opset 21 (the first with int4 and with GroupNormalization as torch computes it), batch
axis dynamic. Only the float model is traced; quantizers are graph rewrites and never meet the exporter.

Inputs are the latent `x`, the timestep `t` and, under their own names, whatever the network is conditioned on. A linear
layer of a 2-D input becomes a Gemm, one of a 3-D input (tokens) a MatMul and an Add; attention that a network computes
by torch's scaled_dot_product_attention has no module of its own, so its products stay in float.
"""

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..calibrate.layers import QUANTIZABLE, UNQUANTIZABLE, QuantizedOperator, quantization
from ..calibrate.trajectory import NOTHING, Condition
from ..runtime.errors import AccuQuantError, near
from ..runtime.files import atomic

OPSET = 21
INPUT, TIMESTEP, OUTPUT = "x", "t", "prediction"
SCOPES = "pkg.torch.onnx.name_scopes"
TRACE = "pkg.torch.onnx.stack_trace"
OPERATOR_TYPES = {"conv": ("Conv",), "linear": ("Gemm", "MatMul"), "matmul": ("MatMul",)}
EXTERNAL_DATA_ABOVE = 64 * 2**20  # bytes of weights; protobuf itself ends at 2 GiB


def trace_float(
    network: nn.Module,
    operators: dict[str, QuantizedOperator],
    sample_shape: tuple[int, ...],
    condition: Condition = NOTHING,
) -> ir.Model:
    """The float graph of `network(x, t, **condition)`, x (batch, *sample_shape), t (batch,); weights are shared.

    `condition` holds an example (B, ...) of every other input; only names, types and (...) are taken from it.

    Raises:
        AccuQuantError: the network does not take such an input, or an operator that calibration knows has no node in
            the graph, or more than one.
    """
    device = next(network.parameters()).device
    x = torch.zeros(2, *sample_shape, device=device)
    t = torch.tensor([0.0, 1.0], device=device)
    given, dynamic = _arguments(network, condition)
    given = {name: torch.cat([value[:1], value[:1]]).to(device) for name, value in given.items()}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of torchvision's absence, which is no concern of ours
    try:
        with warnings.catch_warnings(), quantization(operators, active=False):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (x, t),
                kwargs=given,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT, TIMESTEP, *given],
                output_names=[OUTPUT],
                dynamic_shapes=dynamic,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model
    model.producer_name, model.producer_version = "accuquant", None
    _name_operators(model, operators)
    _name_the_others(model, network, operators)
    for node in model.graph:
        node.metadata_props.pop(TRACE, None)  # the exporting machine's paths; and equal networks are to be equal bytes
    return model


def _arguments(network: nn.Module, condition: Condition) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The condition in the order of the network's parameters, and the dynamic axis of every parameter."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    named = [p.name for p in parameters[2:] if p.kind is not p.VAR_KEYWORD]  # torch.onnx cannot export the others
    if wrong := condition.keys() - set(named):
        raise AccuQuantError(
            f"condition {min(wrong)}: {type(network).__name__} takes {', '.join(['x', 't', *named])}; wrap it in a "
            "module whose forward has a parameter of that name"
        )
    ordered = {name: condition[name] for name in named if name in condition}
    batch = {0: torch.export.Dim("batch", min=1, max=65536)}
    return ordered, dict.fromkeys([*(p.name for p in parameters[:2]), *ordered], batch)


def operator_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Nodes by name; those of quantizable operators carry their module's name."""
    return {node.name: node for node in model.graph if node.name}


def operator_node(nodes: Mapping[str, ir.Node], name: str) -> ir.Node:
    """The node of a recipe's layer, of `operator_nodes`.

    Raises:
        AccuQuantError: there is none.
    """
    if name not in nodes:
        products = {known for known, node in nodes.items() if any(node.op_type in t for t in OPERATOR_TYPES.values())}
        raise AccuQuantError(
            f"layer {name} is not in the graph ({near(name, products)}); every layer of a recipe must be a node of "
            "that name, so recipe and checkpoint do not fit: export what was calibrated, without --resume"
        )
    return nodes[name]


def operator_parts(nodes: Mapping[str, ir.Node], name: str) -> list[str]:
    """A layer's node and, if it was taken apart by its output channels (split_projections), the other parts'."""
    others = (f"{name}/{n}" for n in count(1))
    return [name, *takewhile(nodes.__contains__, others)]


def graph_input(model: ir.Model, name: str) -> ir.Value:
    """The graph's input of that name.

    Raises:
        AccuQuantError: it has none.
    """
    found = {str(value.name): value for value in model.graph.inputs}
    if name not in found:
        raise AccuQuantError(
            f"the graph has no input {name} (it has {', '.join(found) or 'none'}); a denoiser is traced with inputs "
            f"{INPUT} and {TIMESTEP}: trace it with trace_float"
        )
    return found[name]


def _name_operators(model: ir.Model, operators: dict[str, QuantizedOperator]) -> None:
    """Give the one Conv, Gemm or MatMul of each quantized module that module's name."""
    claims: dict[str, list[ir.Node]] = {name: [] for name in operators}
    for node in model.graph:
        for name in _scopes(node):
            if name in operators:
                if node.op_type in OPERATOR_TYPES[operators[name].kind]:
                    claims[name].append(node)
                break
    for name, nodes in claims.items():
        kind = operators[name].kind
        if len(nodes) != 1:
            found = ", ".join(f"{node.op_type} {node.name}" for node in nodes) or "none"
            raise AccuQuantError(
                f"layer {name}: {len(nodes)} nodes in the exported graph ({found}) where one "
                f"{' or '.join(OPERATOR_TYPES[kind])} is expected; a module that is called more than once, or not at "
                f"all, cannot be quantized: keep it in float (--in-float {name}), or give each call a module of its own"
            )
        weight = nodes[0].inputs[1]
        if kind != "matmul" and (weight is None or weight.const_value is None):
            raise AccuQuantError(
                f"layer {name}: the weight of its {nodes[0].op_type} is computed in the exported graph, a constant is "
                f"expected; layers that share a weight cannot be quantized: keep them in float (--in-float {name})"
            )
        nodes[0].name = name
        _name_scaling(nodes[0], name)


def _name_the_others(model: ir.Model, network: nn.Module, operators: dict[str, QuantizedOperator]) -> None:
    """The same for modules that stay in float, as far as one node is theirs; reports tell of them by these names."""
    own = tuple(f"{name}." for name in operators)
    modules = {
        name
        for name, module in network.named_modules()
        if isinstance(module, QUANTIZABLE + UNQUANTIZABLE) and name not in operators and not name.startswith(own)
    }
    claims: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        innermost = next((name for name in _scopes(node) if name in modules), None)
        if innermost is not None and node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
            claims.setdefault(innermost, []).append(node)
    for name, nodes in claims.items():
        if len(nodes) == 1:
            nodes[0].name = name


def _scopes(node: ir.Node) -> Iterator[str]:
    """Names of the modules that a node comes from, the innermost first."""
    text = node.metadata_props.get(SCOPES, "")
    return reversed([name.strip(" '\"") for name in text.strip("[]").split(",")])


def _name_scaling(product: ir.Node, name: str) -> None:
    """Name a Mul right behind a product `<name>/scaled`: compilers fuse the two and report the latter's name."""
    consumers = [usage.node for usage in product.outputs[0].uses()]
    if product.op_type == "MatMul" and len(consumers) == 1 and consumers[0].op_type == "Mul":
        consumers[0].name = f"{name}/scaled"


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph; weights go to `<name>.data` beside it once they are large, one at a time."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = path.with_name(path.name + ".data")
    if size <= EXTERNAL_DATA_ABOVE:
        with atomic(path) as part:
            ir.save(model, part)
        data.unlink(missing_ok=True)  # of a larger graph that had this name
        return
    # A graph names its data file, so both are written under their own names elsewhere and then moved here. For a moment
    # there is no graph, because a graph beside the data of another would be read without an error.
    with atomic(path) as part, TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        ir.save(model, Path(folder) / path.name, external_data=data.name)
        path.unlink(missing_ok=True)
        with atomic(data) as part_of_data:
            os.replace(Path(folder) / data.name, part_of_data)
        os.replace(Path(folder) / path.name, part)
