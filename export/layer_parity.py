"""Does every layer of the graph compute what its simulation computes? Layer by layer, on the same input.

Errors that spread are no guide to where they come from. So the graph shows the inputs and the output of every quantized
operator while it runs along a trajectory, each operator of the simulation is given the very input that the graph's had,
and the two outputs are compared,

    SQNR = 10 log10( sum y_sim^2 / sum max(|y - y_sim| - slack, 0)^2 ),

where values on a rounding boundary give results some slack (ties.py), and most have none. Two correct layers then
differ by float32's last digits, 60 dB and more, and an engine that computes something else is far below. The first
layer below the bar, in the order of the graph, is where the graph departs.
"""

import tempfile
from collections.abc import Callable, Mapping
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
from .graph import save_graph
from .places import Form, operator_places, show_places
from .ties import watch_ties

LEAST = 60.0  # dB
STEPS, TRAJECTORIES = 3, 2
OpenEngine = Callable[[Path, EngineOptions], Engine]


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
    places = operator_places(model, {name: form_of(operator) for name, operator in operators.items()})
    show_places(model, places)

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
                padding = _padding(place.node, operators[name])
                made, slack = _simulated(operators[name], step.timestep, given, padding)
                difference = np.abs(seen[id(place.output)].reshape(made.shape) - made)
                signal[name] += float(np.square(made).sum())
                noise[name] += float(np.square(np.maximum(difference - slack, 0)).sum())
        engine.close()
    return {
        name: min(200.0, 10 * float(np.log10(max(signal[name], 1e-300) / max(noise[name], 1e-300)))) for name in places
    }


def check_layers(parity: Mapping[str, float], engine: str) -> None:
    """Raises AccuQuantError naming the first layer that departs from its simulation, and how many do."""
    departing = {name: db for name, db in parity.items() if not db >= LEAST}
    if departing:
        first, db = next(iter(departing.items()))
        others = f"; so do {len(departing) - 1} layers behind it" if len(departing) > 1 else ""
        raise AccuQuantError(
            f"layer {first}: {engine} computes something else than the simulation ({db:.0f} dB on the same input, "
            f"at least {LEAST:.0f} is expected){others}; the graph is not what was calibrated"
        )


def form_of(operator: QuantizedOperator) -> Form:
    """What `operator_places` has to know of an operator of the simulation."""
    biased = not isinstance(operator, QuantizedLinear) or operator.linear.bias is not None
    return Form(operator.kind, len(operator.input_quantizers), biased)


def _padding(node: ir.Node, operator: QuantizedOperator) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that only the node does: the exporter takes a Pad before a convolution into it."""
    if not isinstance(operator, QuantizedConv2d):
        return 0, 0, 0, 0
    top, left, bottom, right = node.attributes.get_ints("pads", (0, 0, 0, 0))
    own = operator.conv.padding
    assert not isinstance(own, str)
    return left - own[1], right - own[1], top - own[0], bottom - own[0]


def _simulated(
    operator: QuantizedOperator, timestep: float, inputs: list[np.ndarray], padding: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and by how much ties let another's differ."""
    for quantizer in operator.quantizers:
        if quantizer.table is not None:
            quantizer.table.current = quantizer.table.row(timestep)
    device = next(operator.parameters()).device
    given = [torch.from_numpy(np.array(x)).to(device) for x in inputs]
    if isinstance(operator, QuantizedConv2d):
        given = [F.pad(torch.cat(given, 1), padding)]
    with quantization({operator.name: operator}, active=True), watch_ties(operator) as ties:
        made = operator(*given).cpu().double().numpy()
    slack = ties.slack().cpu().double().numpy() if operator.quantizers else np.zeros_like(made)
    return made, slack
