"""Does every layer of the graph compute what its simulation computes? Layer by layer, on the same input.

Errors that spread are no guide to where they come from. So the graph shows the inputs and the output of every quantized
operator while it runs along a trajectory, each operator of the simulation is given the very input that the graph's had,
and the two outputs are compared,

    SQNR = 10 log10( sum ||y_sim||^2 / sum ||y - y_sim||^2 )

Alone, two correct layers differ by float32's last digits: 60 dB and more. An engine that divides by multiplying flips a
rounding here and there, which the smallest layers feel most (55 dB were seen); an engine that computes something else
is far below. The first layer below the bar, in the order of the graph, is where the graph departs.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from ..calibrate.layers import QuantizedConv2d, QuantizedLinear, QuantizedOperator, quantization
from ..calibrate.trajectory import Trajectory
from ..runtime.engines.base import Engine, EngineOptions
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.errors import AccuQuantError
from ..runtime.plan import SamplingPlan
from .graph import operator_nodes, save_graph

LEAST, ENGINE_LEAST = 60.0, 45.0  # dB, of the standard's execution and of an engine's
STEPS, TRAJECTORIES = 3, 2
OpenEngine = Callable[[Path, EngineOptions], Engine]
WRITTEN = ".output.dequantize"
QUANTIZATION = ("DequantizeLinear", "QuantizeLinear", "Clip")


@dataclass(frozen=True)
class Place:
    """An operator's float inputs and its output; `padding` (left, right, top, bottom) is what only its node does."""

    inputs: tuple[ir.Value, ...]
    output: ir.Value
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)


def reference(path: Path, options: EngineOptions) -> Engine:
    """ONNX Runtime without optimisations: every node as the standard defines it."""
    return OnnxRuntimeEngine(path, options, exact=True)


@torch.no_grad()
def layer_parity(
    path: Path,
    operators: Mapping[str, QuantizedOperator],
    plan: SamplingPlan,
    judge: Trajectory,
    open_engine: OpenEngine = reference,
) -> dict[str, float]:
    """SQNR in dB of every operator of the graph at `path` against its simulation, in the order of the graph.

    Raises:
        AccuQuantError: an operator is not in the graph.
    """
    model = ir.load(path)
    places = operator_places(model, operators)
    for place in places.values():
        for value in (*place.inputs, place.output):
            if not value.is_graph_input() and not any(value is shown for shown in model.graph.outputs):
                value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)

    n = min(TRAJECTORIES, len(judge.seeds))
    condition = {name: value.numpy() for name, value in judge.condition_of(slice(n), "cpu").items()}
    signal, noise = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        save_graph(model, Path(folder) / "layers.onnx")
        engine = open_engine(Path(folder) / "layers.onnx", EngineOptions(batch=n))
        for i in np.linspace(0, len(plan) - 1, min(STEPS, len(plan))).round().astype(int).tolist():
            step = plan.steps[i]
            fed = {
                "x": (judge.states[i, :n] * step.input_scale).numpy(),
                "t": np.full(n, step.timestep, np.float32),
                **condition,
            }
            seen = {id(v): fed[str(v.name)] for v in model.graph.inputs}
            seen |= {id(v): array for v, array in zip(model.graph.outputs, engine.run_all(fed), strict=True)}
            for name, place in places.items():
                given = [seen[id(x)] for x in place.inputs]
                made = _simulated(operators[name], step.timestep, given, place.padding).astype(np.float64)
                difference = seen[id(place.output)].reshape(made.shape) - made
                signal[name] += float(np.square(made).sum())
                noise[name] += float(np.square(difference).sum())
        engine.close()
    return {
        name: min(200.0, 10 * float(np.log10(max(signal[name], 1e-300) / max(noise[name], 1e-300)))) for name in places
    }


def check_layers(parity: Mapping[str, float], engine: str, least: float = LEAST) -> None:
    """Raises AccuQuantError naming the first layer that departs from its simulation, and how many do."""
    departing = {name: db for name, db in parity.items() if not db >= least}
    if departing:
        first, db = next(iter(departing.items()))
        others = f"; so do {len(departing) - 1} layers behind it" if len(departing) > 1 else ""
        raise AccuQuantError(
            f"layer {first}: {engine} computes something else than the simulation ({db:.0f} dB on the same input, "
            f"at least {least:.0f} is expected){others}; the graph is not what was calibrated"
        )


def operator_places(model: ir.Model, operators: Mapping[str, QuantizedOperator]) -> dict[str, Place]:
    """Where each operator begins and ends in a lowered graph, in the order of the graph.

    Raises:
        AccuQuantError: an operator is not in the graph.
    """
    nodes = operator_nodes(model)
    if missing := operators.keys() - nodes.keys():
        raise AccuQuantError(f"layer {min(missing)} is not in the graph")
    position = {id(node): n for n, node in enumerate(model.graph)}
    places: dict[str, Place] = {}
    for name in sorted(operators, key=lambda name: position[id(nodes[name])]):
        operator, node = operators[name], nodes[name]
        if operator.kind == "matmul":
            inputs = tuple(_float_input(node, name, index) for index in (0, 1))
        elif len(operator.input_quantizers) == 2:
            inputs = (_float_input(node, name, 0), _float_input(nodes[f"{name}.second"], f"{name}.second", 0))
        else:
            inputs = (_float_input(node, name, 0),)
        places[name] = Place(inputs, _output(node, name, operator), _padding(node, operator))
    return places


def _float_input(node: ir.Node, name: str, index: int) -> ir.Value:
    """What stood before quantization, table and smoothing."""
    value = node.inputs[index]
    assert value is not None
    ours = {f"{name}.smooth", f"{name}.input{index}.divide"}
    while (producer := value.producer()) and (producer.op_type in QUANTIZATION or producer.name in ours):
        if producer.name and producer.name.endswith(WRITTEN):  # on the grid of another's output, which is not undone
            break
        above = producer.inputs[0]
        assert above is not None
        value = above
    return value


def _output(node: ir.Node, name: str, operator: QuantizedOperator) -> ir.Value:
    """What stands behind the parts' sum, the table's factors and the bias."""
    value = node.outputs[0]
    bias_behind = (
        node.op_type == "MatMul" and isinstance(operator, QuantizedLinear) and operator.linear.bias is not None
    )
    while following := list(_behind(value, name, bias_behind)):
        (after,) = following
        bias_behind = bias_behind and bool(after.name and after.name.startswith(f"{name}."))
        value = after.outputs[0]
    return value


def _behind(value: ir.Value, name: str, bias_behind: bool) -> Iterator[ir.Node]:
    for usage in value.uses():
        node = usage.node
        ours = node.name is not None and node.name.startswith(f"{name}.")
        biased = (
            bias_behind and node.op_type == "Add" and any(v is not None and v.is_initializer() for v in node.inputs)
        )
        if ours or biased:
            yield node


def _padding(node: ir.Node, operator: QuantizedOperator) -> tuple[int, int, int, int]:
    """The exporter takes a Pad in front of a convolution into its node."""
    if not isinstance(operator, QuantizedConv2d):
        return 0, 0, 0, 0
    top, left, bottom, right = node.attributes.get_ints("pads", (0, 0, 0, 0))
    own = operator.conv.padding
    assert not isinstance(own, str)
    return left - own[1], right - own[1], top - own[0], bottom - own[0]


def _simulated(
    operator: QuantizedOperator, timestep: float, inputs: list[np.ndarray], padding: tuple[int, int, int, int]
) -> np.ndarray:
    for quantizer in operator.quantizers:
        if quantizer.table is not None:
            quantizer.table.current = quantizer.table.row(timestep)
    device = next(operator.parameters()).device
    given = [torch.from_numpy(np.array(x)).to(device) for x in inputs]
    if isinstance(operator, QuantizedConv2d):
        given = [F.pad(torch.cat(given, 1), padding)]
    with quantization({operator.name: operator}, active=True):
        return operator(*given).cpu().numpy()
