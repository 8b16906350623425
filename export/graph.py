"""The float network as an ONNX graph, every quantizable node named after its module.

torch.onnx's dynamo exporter, opset 21 (the first with int4 and with GroupNormalization as torch computes it), batch
axis dynamic. Only the float model is traced; quantizers are graph rewrites and never meet the exporter.
"""

import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from ..calibrate.layers import QuantizedOperator, quantization
from ..runtime.errors import AccuQuantError
from ..runtime.files import atomic

OPSET = 21
INPUT, TIMESTEP, OUTPUT = "x", "t", "prediction"
SCOPES = "pkg.torch.onnx.name_scopes"
OPERATOR_TYPES = {"conv": ("Conv",), "linear": ("Gemm", "MatMul"), "matmul": ("MatMul",)}
EXTERNAL_DATA_ABOVE = 64 * 2**20  # bytes of weights; protobuf itself ends at 2 GiB


def trace_float(network: nn.Module, operators: dict[str, QuantizedOperator], sample_shape: tuple[int, ...]) -> ir.Model:
    """The float graph of `network(x, t)`, with x (batch, *sample_shape), t (batch,); weights are shared, not copied.

    Raises:
        AccuQuantError: an operator that calibration knows has no node in the graph, or more than one.
    """
    device = next(network.parameters()).device
    x = torch.zeros(2, *sample_shape, device=device)
    t = torch.tensor([0.0, 1.0], device=device)
    batch = torch.export.Dim("batch", min=1, max=65536)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of torchvision's absence, which is no concern of ours
    try:
        with warnings.catch_warnings(), quantization(operators, active=False):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (x, t),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT, TIMESTEP],
                output_names=[OUTPUT],
                dynamic_shapes={"x": {0: batch}, "t": {0: batch}},
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model
    model.producer_name, model.producer_version = "accuquant", None
    _name_operators(model, operators)
    return model


def operator_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Nodes by name; those of quantizable operators carry their module's name."""
    return {node.name: node for node in model.graph if node.name}


def _name_operators(model: ir.Model, operators: dict[str, QuantizedOperator]) -> None:
    """Give the one Conv, Gemm or MatMul of each quantized module that module's name."""
    claims: dict[str, list[ir.Node]] = {name: [] for name in operators}
    for node in model.graph:
        scopes = node.metadata_props.get(SCOPES, "")
        for name in reversed([s.strip(" '\"") for s in scopes.strip("[]").split(",")]):
            if name in operators and node.op_type in OPERATOR_TYPES[operators[name].kind]:
                claims[name].append(node)
                break
    for name, nodes in claims.items():
        if len(nodes) != 1:
            raise AccuQuantError(
                f"layer {name}: {len(nodes)} nodes in the exported graph where one {operators[name].kind} is expected"
            )
        nodes[0].name = name
        _name_scaling(nodes[0], name)


def _name_scaling(product: ir.Node, name: str) -> None:
    """Name a Mul right behind a product `<name>/scaled`: compilers fuse the two and report the latter's name."""
    consumers = [usage.node for usage in product.outputs[0].uses()]
    if product.op_type == "MatMul" and len(consumers) == 1 and consumers[0].op_type == "Mul":
        consumers[0].name = f"{name}/scaled"


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph; weights go to `<name>.data` beside it once they are large."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size <= EXTERNAL_DATA_ABOVE:
        with atomic(path) as part:
            ir.save(model, part)
        return
    # The graph names its data file, so both are written under their final names, inside a folder made atomically.
    ir.save(model, path, external_data=path.name + ".data")
