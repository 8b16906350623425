"""Three ways to quantize a convolution of [a, b], two tensors of different range: what each costs and what it loses.

    shared      one scale for both            Conv(Q(Concat(a, b)))
    split       two convolutions and an add   Conv(Q_a(a), w_a) + Conv(Q_b(b), w_b)
    pre-scaled  scales in front, one grid     Conv(Q_1(Concat(a / s_a, b / s_b)), [s_a w_a, s_b w_b])

The last needs no second convolution, but its weights take the scales in: where a's and b's differ, so do columns of one
row, which share a grid. Of every convolution of a concatenation in the bundled model, on its own activations along
trajectories: the error of its result at W8 and W4, weights rounded to the nearest, all ranges min-max; a call's time on
OpenVINO, the three in turn; and the kernels that TensorRT-RTX makes of it ahead of time.

    python tools/bench_split.py --out tools/results/split.json
"""

import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import typer
from accuquant.calibrate.families import load_model
from accuquant.calibrate.splits import find_splits
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import TEACHER_SEEDS
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.engines.base import Engine, EngineOptions
from accuquant.runtime.engines.openvino import OpenVINOEngine
from accuquant.runtime.files import write_text
from accuquant.runtime.interleave import interleaved, spread
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table
from side_by_side import compiled
from torch import Tensor

CHECKPOINT = Path(__file__).parent / "reference" / "fashion-ddim.ckpt"
FORMS = ("shared", "split", "pre-scaled")
BATCH, CHAINS, BITS = 8, 4, (8, 4)


def activations(checkpoint: Path) -> tuple[dict[str, tuple[int, torch.nn.Conv2d]], dict[str, Tensor]]:
    """Convolutions of concatenations with the first part's channels, and what they are called with: (N, C, H, W)."""
    model = load_model(checkpoint)
    plan = trace(model.default_sampler, model.noise_schedule, 10)
    states = simulate(model.network, plan, range(TEACHER_SEEDS, TEACHER_SEEDS + CHAINS), model.sample_shape).states
    found = find_splits(model.network, model.sample_shape)
    layers, seen = dict(model.network.named_modules()), dict[str, list[Tensor]]()

    def keep(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0])

    handles = [layers[name].register_forward_pre_hook(keep(name)) for name in found]
    with torch.no_grad():
        for i, step in enumerate(plan.steps):
            model.network(states[i] * step.input_scale, torch.full((CHAINS,), float(step.timestep)))
    for handle in handles:
        handle.remove()
    convolutions = {name: (width, layers[name]) for name, width in found.items()}
    return convolutions, {name: torch.cat(values) for name, values in seen.items()}  # type: ignore[return-value]


def step_of(x: Tensor, bits: int = 8) -> Tensor:
    """Scale of a symmetric grid that reaches x's largest magnitude."""
    return x.abs().max() / (2 ** (bits - 1) - 1)


def on_grid(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    most = 2 ** (bits - 1) - 1
    return (x / scale).round().clamp(-most - 1, most) * scale


def on_rows(w: Tensor, bits: int) -> Tensor:
    """A grid for every output channel."""
    scale = w.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return on_grid(w, scale, bits)


def result(form: str, x: Tensor, w: Tensor, width: int, bits: int, padding: Any) -> Tensor:
    """Of the quantized convolution, without its bias."""
    parts, weights = (x[:, :width], x[:, width:]), (w[:, :width], w[:, width:])
    scales = [step_of(part) for part in parts]
    if form == "shared":
        return F.conv2d(on_grid(x, step_of(x)), on_rows(w, bits), padding=padding)
    if form == "split":
        pairs = zip(parts, scales, weights, strict=True)
        return sum((F.conv2d(on_grid(p, s), on_rows(v, bits), padding=padding) for p, s, v in pairs), torch.zeros(()))
    codes = torch.cat([on_grid(p, s) / s for p, s in zip(parts, scales, strict=True)], 1)
    taken_in = torch.cat([v * s for v, s in zip(weights, scales, strict=True)], 1)
    return F.conv2d(codes, on_rows(taken_in, bits), padding=padding)


def graph(form: str, x: Tensor, w: Tensor, width: int, padding: Any) -> onnx.ModelProto:
    """The form as Q/DQ in ONNX, with signed codes as TensorRT takes them and weights in 8 bits."""
    held: dict[str, np.ndarray] = {"zero": np.array(0, np.int8)}
    nodes: list[onnx.NodeProto] = []
    pads = [padding[0], padding[1], padding[0], padding[1]]
    a, b = x[:, :width], x[:, width:]

    def convolution(name: str, source: str, scale: float, weight: Tensor) -> str:
        rows = weight.abs().amax((1, 2, 3)).clamp(min=1e-12) / 127
        held[f"{name}.codes"] = (weight / rows[:, None, None, None]).round().to(torch.int8).numpy()
        held[f"{name}.rows"], held[f"{name}.none"] = rows.numpy(), np.zeros(len(rows), np.int8)
        held[f"{name}.scale"] = np.array(scale, np.float32)
        nodes.extend(
            (
                helper.make_node("QuantizeLinear", [source, f"{name}.scale", "zero"], [f"{name}.q"]),
                helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.scale", "zero"], [f"{name}.x"]),
                helper.make_node(
                    "DequantizeLinear", [f"{name}.codes", f"{name}.rows", f"{name}.none"], [f"{name}.w"], axis=0
                ),
                helper.make_node("Conv", [f"{name}.x", f"{name}.w"], [f"{name}.y"], name=name, pads=pads),
            )
        )
        return f"{name}.y"

    if form == "split":
        first = convolution("a_conv", "a", float(step_of(a)), w[:, :width])
        second = convolution("b_conv", "b", float(step_of(b)), w[:, width:])
        nodes.append(helper.make_node("Add", [first, second], ["o"]))
    else:
        joined = ["a", "b"]
        if form == "pre-scaled":
            joined = ["a_small", "b_small"]
            for name, part in (("a", a), ("b", b)):
                held[f"{name}_factor"] = np.array(1 / float(step_of(part)), np.float32)
                nodes.append(helper.make_node("Mul", [name, f"{name}_factor"], [f"{name}_small"]))
            w = torch.cat([w[:, :width] * step_of(a), w[:, width:] * step_of(b)], 1)
        nodes.append(helper.make_node("Concat", joined, ["joined"], axis=1))
        scale = 1.0 if form == "pre-scaled" else float(step_of(x))
        nodes.append(helper.make_node("Identity", [convolution("conv", "joined", scale, w)], ["o"]))
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *part.shape[1:]])
        for name, part in (("a", a), ("b", b), ("o", F.conv2d(x[:1], w, padding=padding)))
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in held.items()]
    made = helper.make_graph(nodes, form, ports[:2], ports[2:], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def step_seconds(engines: Mapping[str, Engine], x: Tensor, width: int, repeats: int) -> dict[str, dict[str, float]]:
    """CPU time of a call of every form, in turn."""
    fed = {"a": np.ascontiguousarray(x[:BATCH, :width]), "b": np.ascontiguousarray(x[:BATCH, width:])}
    calls = {form: partial(engine.run, fed) for form, engine in engines.items()}
    taken = interleaved(calls, repeats, warm_up=5, clock=time.process_time)
    return {form: spread(seconds) for form, seconds in taken.items()}


def measure(layer: torch.nn.Conv2d, width: int, x: Tensor, repeats: int, gpu: str, folder: Path) -> dict[str, Any]:
    """One convolution: a row for every form."""
    w, padding = layer.weight.detach(), layer.padding
    reference = F.conv2d(x, w, padding=padding)  # type: ignore[arg-type]
    rows: dict[str, Any] = {form: {"sqnr": {}} for form in FORMS}
    engines: dict[str, Engine] = {}
    for form in FORMS:
        for bits in BITS:
            noise = (result(form, x, w, width, bits, padding) - reference).square().sum()
            rows[form]["sqnr"][str(bits)] = float(10 * torch.log10(reference.square().sum() / noise))
        path = folder / f"{form}.onnx"
        onnx.save(graph(form, x, w, width, padding), path)
        rows[form]["compiled"] = compiled(path, gpu, folder)
        engines[form] = OpenVINOEngine(path, EngineOptions(BATCH, 1))
    for form, seconds in step_seconds(engines, x, width, repeats).items():
        rows[form]["seconds"] = seconds
        engines[form].close()
    ratio = float(step_of(x[:, :width]) / step_of(x[:, width:]))
    return {"channels": [width, x.shape[1] - width], "scales": ratio, "forms": rows}


def table(report: Mapping[str, Any]) -> Table:
    made = Table(title=f"SQNR in dB at W8, W4; CPU time of a call of {BATCH}, median of {report['repeats']}")
    for column in ("", "s_a / s_b", *FORMS):
        made.add_column(column)
    for name, one in report["layers"].items():
        cells = (
            f"{row['sqnr']['8']:.1f}, {row['sqnr']['4']:.1f}; {row['seconds']['median'] * 1e6:.0f} us"
            for row in one["forms"].values()
        )
        made.add_row(name, f"{one['scales']:.2f}", *cells)
    return made


def main(
    repeats: Annotated[int, typer.Option(min=8, help="Timed calls of every form.")] = 60,
    gpu: Annotated[str, typer.Option(help="What TensorRT-RTX compiles for.")] = "sm89",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("build/split.json"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure the forms on the bundled model."""
    convolutions, seen = activations(CHECKPOINT)
    layers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, bar() as show:
        for k, (name, (width, layer)) in enumerate(convolutions.items()):
            show("convolutions", k, len(convolutions), name)
            layers[name] = measure(layer, width, seen[name], repeats, gpu, Path(folder))
    report = {
        "schema_version": 1, "checkpoint": CHECKPOINT.name, "batch": BATCH, "repeats": repeats, "gpu": gpu,
        "calls": len(next(iter(seen.values()))), "machine": machine_facts(), "layers": layers,
    }  # fmt: skip
    write_text(out, json.dumps(report, indent=1) + "\n")
    console.print(table(report))


if __name__ == "__main__":
    command(main)()
