"""Memory and time of one calibration iteration against M, the sampling steps it simulates.

Every cell (gradient, M) runs in a process of its own: one warm-up iteration, then the timed ones. The peak is the whole
process's during its iterations (Linux: VmHWM); what it held before (weights, libraries, rounding variables) is given
beside it. Plain unrolling, which keeps the graph of every step, is the yardstick; a cell that needs more than
--limit-gib is recorded as such.

    python tools/bench_calibration.py --out tools/results/cost-bundled.json
    python tools/bench_calibration.py --model sd15 --batch 1 --out tools/results/cost-sd15.json

`sd15` is a U-Net of Stable Diffusion 1.5's shape (859 M parameters, latents 4x64x64) with random weights: only scales
and zero points are learned there, since rounding variables alone would fill the machine.
"""

import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuquant.calibrate.carry import carry
from accuquant.calibrate.families import load_model
from accuquant.calibrate.layers import QuantizedOperator, fast_compute, quantization, quantize_operators
from accuquant.calibrate.multistep import Group, GroupBatch, accumulate_gradient, unrolled_loss
from accuquant.calibrate.rounding import training_codes
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import Trajectory
from accuquant.export.facts import versions
from accuquant.export.figures import lines, markup
from accuquant.runtime.console import console, machine_facts
from accuquant.runtime.files import write_text
from accuquant.runtime.plan import SamplingPlan
from rich.table import Table
from torch import Tensor, nn

BUNDLED = Path(__file__).parent / "reference" / "fashion-ddim.ckpt"
GRADIENTS = ("exact", "injected-v", "unrolled")
DEPTHS = (1, 2, 4, 8, 16)
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class StableDiffusionShape(nn.Module):
    """UNet2DConditionModel with SD 1.5's published configuration and torch's random initialisation, text fixed."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        self.text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=self.text.expand(len(x), -1, -1), return_dict=False)[0]


def prepare(
    model: str, bits: tuple[int, int]
) -> tuple[nn.Module, dict[str, QuantizedOperator], SamplingPlan, tuple[int, ...]]:
    """Network with quantized operators on ranges of plausible size, a DDIM plan of 50 steps, and the latent's shape."""
    scheme = QuantScheme(weight_bits=bits[0], activation_bits=bits[1])
    if model == "sd15":
        torch.manual_seed(0)
        network: nn.Module = StableDiffusionShape().eval().requires_grad_(False)
        shape: tuple[int, ...] = (4, 64, 64)
        plan = trace("ddim", {**BETAS, "prediction_type": "epsilon", "timestep_spacing": "leading"}, 50)
        operators = quantize_operators(network, scheme, lambda name: "body")
    else:
        loaded = load_model(BUNDLED)
        network, shape = loaded.network, loaded.sample_shape
        plan = trace("ddim", loaded.noise_schedule, 50)
        operators = quantize_operators(network, scheme, loaded.role_of)
    for operator in operators.values():
        for quantizer in operator.quantizers:
            grid = quantizer.grid
            middle = 0.0 if grid.symmetric else float(1 << (grid.bits - 1))
            quantizer.set(torch.tensor(8.0 / (1 << grid.bits)), torch.tensor(middle))
        weight = operator.weight_quantizer
        if weight is not None:
            weight.set_scale(weight.weight.abs().flatten(1).amax(1).view_as(weight.scale) / weight.grid.q_max)
            if model != "sd15":
                weight.learn("offset")
    return network, operators, plan, shape


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the resident set, VmHWM its peak since the last `forget_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def cell(model: str, gradient: str, depth: int, batch: int, iterations: int, bits: tuple[int, int]) -> dict[str, float]:
    """One cell, measured in this process."""
    network, operators, plan, shape = prepare(model, bits)
    device = next(network.parameters()).device
    weights = [op.weight_quantizer for op in operators.values() if op.weight_quantizer is not None]
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
    data = GroupBatch(x, torch.zeros_like(x), {}, lambda j: torch.zeros_like(x))
    group = Group(20, 20 + depth)
    empty = Trajectory((), x, x)
    factors = None if gradient == "unrolled" else carry(plan, gradient, network, empty)  # type: ignore[arg-type]

    def iteration() -> None:
        with quantization(operators, True, fast_compute(device)), training_codes(weights):
            if gradient == "unrolled":
                unrolled_loss(network, plan, group, data).backward()
            else:
                accumulate_gradient(network, plan, group, data, factors)

    gc.collect()
    forget_peak()
    held = resident("VmRSS")
    begun = time.perf_counter()
    iteration()
    if iterations:  # then the first one only warms up
        begun = time.perf_counter()
    for _ in range(iterations):
        iteration()
    seconds = (time.perf_counter() - begun) / max(1, iterations)
    return {"held_bytes": held, "peak_bytes": resident("VmHWM"), "seconds": seconds}


def main(
    out: Annotated[Path, typer.Option()] = Path("build/calibration-cost.json"),
    model: Annotated[str, typer.Option(help="bundled or sd15.")] = "bundled",
    batch: Annotated[int, typer.Option()] = 8,
    iterations: Annotated[int, typer.Option(help="Timed ones; 0 times the first one.")] = 3,
    depths: Annotated[str, typer.Option(help="Values of M, separated by commas.")] = ",".join(map(str, DEPTHS)),
    gradients: Annotated[str, typer.Option()] = ",".join(GRADIENTS),
    limit_gib: Annotated[float, typer.Option(help="Address space of a cell; beyond it, it is given up.")] = 20.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    note: Annotated[str, typer.Option(help="What a reader of the numbers should know, such as other work.")] = "",
    only_cell: Annotated[str, typer.Option("--cell", hidden=True)] = "",
) -> None:
    """Measure every cell, print the table, write JSON and the plot beside it."""
    if threads:
        torch.set_num_threads(threads)
    if only_cell:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit_gib * 2**30),) * 2)
        gradient, depth = only_cell.split(":")
        print(json.dumps(cell(model, gradient, int(depth), batch, iterations, (4, 8))))
        return
    rows: list[dict[str, Any]] = []
    for gradient in gradients.split(","):
        for depth in map(int, depths.split(",")):
            arguments = [
                "--model", model, "--batch", str(batch), "--iterations", str(iterations), "--limit-gib", str(limit_gib),
                "--threads", str(torch.get_num_threads()), "--cell", f"{gradient}:{depth}",
            ]  # fmt: skip
            child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
            row: dict[str, Any] = {"gradient": gradient, "group": depth}
            if child.returncode == 0:
                row |= json.loads(child.stdout.splitlines()[-1])
                console.print(f"{gradient}, M = {depth}: {row['peak_bytes'] / 2**30:.2f} GiB, {row['seconds']:.2f} s")
            elif "alloc" in child.stderr or "MemoryError" in child.stderr:
                row["beyond_bytes"] = int(limit_gib * 2**30)
                console.print(f"{gradient}, M = {depth}: more than {limit_gib:g} GiB")
            else:
                raise SystemExit(f"{gradient}, M = {depth} failed:\n{child.stderr[-2000:]}")
            rows.append(row)
    report = {
        "schema_version": 1,
        "model": model,
        "scheme": "W4A8",
        "batch": batch,
        "iterations": iterations,
        "threads": torch.get_num_threads(),
        "note": note,
        "machine": machine_facts(),
        "versions": versions(),
        "rows": rows,
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    curves = {
        g: ([r["group"] for r in rows if r["gradient"] == g and "peak_bytes" in r],
            [r["peak_bytes"] / 2**30 for r in rows if r["gradient"] == g and "peak_bytes" in r])
        for g in gradients.split(",")
    }  # fmt: skip
    title = f"Peak memory of one iteration, {model}, batch {batch}"
    write_text(out.with_suffix(".svg"), markup(lines(curves, title, "M, sampling steps simulated", "GiB", log="x")))
    table = Table(title=f"{model}, batch {batch}, {torch.get_num_threads()} threads")
    for column in ("gradient", "M", "peak GiB", "of it before", "s per iteration"):
        table.add_column(column, justify="right")
    for row in rows:
        fits = "peak_bytes" in row
        table.add_row(
            row["gradient"], str(row["group"]),
            f"{row['peak_bytes'] / 2**30:.2f}" if fits else f"> {limit_gib:g}",
            f"{row['held_bytes'] / 2**30:.2f}" if fits else "-",
            f"{row['seconds']:.2f}" if fits else "-",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
