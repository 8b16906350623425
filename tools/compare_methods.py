"""Calibration methods side by side: same checkpoint, grids, layer policy, trajectories, budget and seeds.

    min-max       full observed ranges, weights rounded to nearest; nothing learned
    mse           ranges of least squared error, weights rounded to nearest; nothing learned
    per-step      learned with groups of one step (M = 1): every step judged by itself
    multi-step    learned with groups of M steps, judged at the group's end

The budget of the two learners is equal in network calls: per-step gets M times the iterations. Every method is lowered
to the same graph and sampled on this machine's engine, and its pictures are compared with those of the fp twin.

    python tools/compare_methods.py tools/reference/fashion-ddim.ckpt --bits 4/8 --out tools/results/methods-w4a8.json
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accuquant.calibrate.families import load_model
from accuquant.calibrate.journal import Journal
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.optimize import calibrate
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme, parse_bits
from accuquant.calibrate.spec import CalibrationSpec
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import JUDGE_SEEDS, TEACHER_SEEDS, versions
from accuquant.export.graph import save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.runtime import noise
from accuquant.runtime.console import bar, console, machine_facts
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.fidelity import psnr, ssim
from accuquant.runtime.files import write_text
from accuquant.runtime.pictures import to_uint8
from rich.table import Table

BATCH = 16


def methods(spec: CalibrationSpec) -> dict[str, CalibrationSpec]:
    """The four methods as specifications; the learners spend equally many network calls."""
    nothing = {"iterations": 0, "rounding": "nearest"}
    return {
        "min-max": spec.model_copy(update={**nothing, "initialisation": "min-max"}),
        "mse": spec.model_copy(update=nothing),
        "per-step": spec.model_copy(update={"group": 1, "iterations": spec.iterations * spec.group}),
        "multi-step": spec,
    }


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    bits: Annotated[str, typer.Option()] = "4/8",
    out: Annotated[Path, typer.Option()] = Path("build/methods.json"),
    target: Annotated[str, typer.Option()] = "cpu",
    sampler: Annotated[str, typer.Option(help="The family's own if left out.")] = "",
    n: Annotated[int, typer.Option(help="Held-out seeds compared.")] = 256,
    only: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "min-max,mse,per-step,multi-step",
    set_: Annotated[list[str], typer.Option("--set", help="Calibration setting, such as group=10.")] = [],  # noqa: B006
) -> None:
    """Run the methods and write one JSON."""
    settings = {k: json.loads(v) if v[0].isdigit() else v for k, _, v in (s.partition("=") for s in set_)}
    spec = CalibrationSpec(**settings)
    weight_bits, activation_bits = parse_bits(bits)
    scheme = QuantScheme(weight_bits=weight_bits, activation_bits=activation_bits, target=target)  # type: ignore[arg-type]
    fp_latents: np.ndarray | None = None
    rows: list[dict[str, Any]] = []
    for name, chosen in methods(spec).items():
        if name not in only.split(","):
            continue
        model = load_model(checkpoint)
        plan = trace(sampler or model.default_sampler, model.noise_schedule, model.default_steps)
        operators = quantize_operators(model.network, scheme, model.role_of)
        teacher = simulate(
            model.network, plan, range(TEACHER_SEEDS, TEACHER_SEEDS + spec.trajectories), model.sample_shape
        )
        judge = simulate(model.network, plan, range(JUDGE_SEEDS, JUDGE_SEEDS + spec.held_out), model.sample_shape)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, bar() as show:
            outcome = calibrate(
                model.network,
                operators,
                plan,
                teacher,
                judge,
                chosen,
                Journal(Path(folder), {}),
                report=lambda s, d, t, loss, name=name: show(f"{name}: {s}", d, t, f"{loss:.2e}" if loss else ""),  # type: ignore[misc]
            )
            seconds = time.perf_counter() - begun
            quantized, twin = lower(
                trace_float(model.network, operators, model.sample_shape), freeze(operators, scheme, {}), scheme.target
            )
            latents = {}
            for graph_name, graph in (("denoiser", quantized), ("twin", twin)):
                if graph_name == "twin" and fp_latents is not None:
                    continue
                path = Path(folder) / f"{graph_name}.onnx"
                save_graph(graph, path)
                latents[graph_name] = sample(path, plan, n, model.sample_shape)
            fp_latents = latents.get("twin", fp_latents)
        assert fp_latents is not None
        a, b = to_uint8(fp_latents), to_uint8(latents["denoiser"])
        p, s = psnr(a, b), ssim(a, b)
        rows.append(
            {
                "method": name,
                "group": chosen.group,
                "iterations": chosen.iterations,
                "psnr_mean": float(p.mean()),
                "psnr_p10": float(np.percentile(p, 10)),
                "ssim_mean": float(s.mean()),
                "mse": float(np.square(np.clip(fp_latents, -1, 1) - np.clip(latents["denoiser"], -1, 1)).mean()),
                "held_out": outcome.held_out,
                "kept": outcome.kept,
                "seconds": seconds,
            }
        )
        console.print(f"{name}: PSNR {p.mean():.2f} dB, SSIM {s.mean():.4f} (n = {n}), {seconds:.0f} s")
    report = {
        "schema_version": 1,
        "checkpoint": checkpoint.name,
        "scheme": scheme.model_dump(),
        "sampler": sampler or "the family's own",
        "calibration": spec.model_dump(),
        "n": n,
        "seeds": [0, n - 1],
        "machine": machine_facts(),
        "versions": versions(),
        "rows": rows,
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    table = Table(title=f"{checkpoint.name} at {scheme.name}, n = {n}")
    for column in ("method", "M", "iterations", "PSNR dB", "p10", "SSIM", "MSE", "calibration s"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r["method"], str(r["group"]), str(r["iterations"]), f"{r['psnr_mean']:.2f}", f"{r['psnr_p10']:.2f}",
            f"{r['ssim_mean']:.4f}", f"{r['mse']:.2e}", f"{r['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def sample(path: Path, plan: Any, n: int, shape: tuple[int, ...]) -> np.ndarray:
    """Final latents (n, *shape) of seeds 0..n-1 on this machine's best engine."""
    engine = open_engine(path, EngineOptions(batch=BATCH))
    done = []
    for first in range(0, n, BATCH):
        seeds = range(first, first + BATCH)
        done.append(
            plan.sample(
                lambda x, t: engine.run({"x": x, "t": np.full(BATCH, t, np.float32)}).copy(),
                lambda j, seeds=seeds: noise.batch(seeds, j, shape),
            )
        )
    engine.close()
    return np.concatenate(done)[:n]


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    typer.run(main)
