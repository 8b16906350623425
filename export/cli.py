"""`accuquant-export CKPT --bits 4/8`: a checkpoint in, a bundle out."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from pydantic import ValidationError

from ..calibrate.cache import TrajectoryCache
from ..calibrate.checkpoint import name_of
from ..calibrate.estimate import free_memory
from ..calibrate.lora import parse_lora
from ..calibrate.scheme import POLICIES, QuantScheme, parse_precision
from ..calibrate.spec import PRESETS, CalibrationSpec, PresetName, parse_settings
from ..calibrate.trace import SAMPLERS
from ..runtime.console import bar, command, console, machine_facts
from ..runtime.errors import AccuQuantError
from ..runtime.files import cache_folder
from .build import build, load, prepare
from .request import Request, check_out
from .summary import summary
from .tune import Workshop
from .tune import tune as measure_tuning
from .tuning import Tuning


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A diffusion model's file (.ckpt, .pt, .safetensors) or folder.")],
    bits: Annotated[str, typer.Option(help="Weights/activations: 8/8, 4/8 (or 4), 4/16, fp8, fp16 or bf16.")] = "8/8",
    out: Annotated[Path | None, typer.Option(help="Bundle folder [NAME-w4a8 in this folder].")] = None,
    target: Annotated[str, typer.Option(help="Whose kernels: cpu (OpenVINO), onnxruntime or tensorrt.")] = "cpu",
    preset: Annotated[str, typer.Option(help="Calibration effort: smoke, default or best.")] = "default",
    sampler: Annotated[str | None, typer.Option(help=f"One of {', '.join(SAMPLERS)} [the family's].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps [the family's].")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance to calibrate for, of conditional models [the family's]."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="; ".join(f"{k}: {v.describes}" for k, v in POLICIES.items()))
    ] = "standard",
    reserve: Annotated[
        float, typer.Option(help="Share of the low-bit weights that keeps 8 bits, where rounding costs most.")
    ] = 0.1,
    split: Annotated[bool, typer.Option("--split", help="A scale for each part of a concatenated shortcut.")] = False,
    attention: Annotated[
        str, typer.Option(help="Attention's products: float or quantized [float for tensorrt, which fuses them so].")
    ] = "auto",
    in_float: Annotated[
        list[str], typer.Option(help="A layer to leave in float, or a pattern of such ('mid.*'); may be repeated.")
    ] = [],  # noqa: B006
    container: Annotated[str, typer.Option(help="Weights of up to 4 bits: packed two to a byte, or int8.")] = "packed",
    rest: Annotated[
        str, typer.Option(help="What is not integer, for tensorrt: float32, float16 or bfloat16 [float16 there].")
    ] = "auto",
    group: Annotated[int | None, typer.Option(min=1, help="M, steps simulated before the loss [5].")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="A calibration setting, such as gradient=injected-v.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0)] = 0,
    time_table: Annotated[
        bool,
        typer.Option(help="Look the time embedding up at the plan's timesteps; without it, any plan can be sampled."),
    ] = True,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure here which layers are faster in float, and leave those so.")
    ] = False,
    tune_batch: Annotated[int, typer.Option(min=1, help="Batch size at which --tune measures.")] = 8,
    tuned: Annotated[
        Path | None, typer.Option(help="Decide as an earlier --tune did: its bundle, or the record as JSON.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The model's YAML, if it does not lie beside it.")] = None,
    lora: Annotated[
        list[str], typer.Option(help="A LoRA to fuse, FILE or FILE:WEIGHT, of text-to-image models; may be repeated.")
    ] = [],  # noqa: B006
    conditions: Annotated[
        Path | None, typer.Option(help="Embeddings to calibrate with, of models without their text encoder.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures compared in the report.")] = 64,
    device: Annotated[str, typer.Option(help="Where calibration runs: auto, cpu or cuda.")] = "auto",
    cache_gib: Annotated[
        float, typer.Option(min=0, help="Disk for teacher trajectories that later runs can use again; 0 keeps none.")
    ] = 2.0,
    ray: Annotated[
        int,
        typer.Option(
            min=0, help="Teacher trajectories on so many workers of Ray, here or on the cluster RAY_ADDRESS names."
        ),
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Calibrate a checkpoint over several sampling steps and write a low-bit bundle with its proof."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    precision = parse_precision(bits)
    if rest == "auto":
        rest = precision.get("rest", "float16" if target == "tensorrt" else "float32")
    elif rest != precision.get("rest", rest):
        raise AccuQuantError(f"--bits {bits} --rest {rest}: {bits} says what everything is; leave --rest out")
    scheme = _validated(
        QuantScheme,
        **precision | {"rest": rest},
        target=target,
        policy=policy,
        reserve=reserve,
        attention=attention,
        container=container,
        split=split,
        in_float=tuple(in_float),
    )
    if preset not in PRESETS:
        raise AccuQuantError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    chosen = dict(PRESETS[cast(PresetName, preset)]) | parse_settings(set_) | {"seed": seed}
    if group is not None:
        chosen["group"] = group
    if scheme.nothing_quantized:
        chosen |= {"trajectories": 1, "iterations": 0}
    request = Request(
        checkpoint=checkpoint,
        out=out or Path(f"{name_of(checkpoint)}-{scheme.name.lower()}"),
        scheme=scheme,
        spec=_validated(CalibrationSpec, **chosen),
        config=config,
        loras=tuple(parse_lora(text) for text in lora),
        conditions=conditions,
        sampler=sampler,
        steps=steps,
        resume=resume,
        device=_device(device),
        pictures=pictures,
        time_table=time_table,
        guidance=guidance,
        cache=TrajectoryCache(cache_folder(), int(cache_gib * 2**30)),
        ray=ray,
    )
    if tune or tuned is not None:
        request = _tuned(request, tune_batch if tune else None, tuned)
    prepared = prepare(request)
    spec, cost = request.spec, prepared.estimate
    console.print(f"found    {prepared.model.found}")
    console.print(f"sampler  {prepared.plan.sampler}, {len(prepared.plan)} network calls")
    if request.tuning is not None:
        console.print(f"tuning   {request.tuning.told}")
    console.print(
        f"scheme   {scheme.name} for {scheme.target}, policy {request.scheme.described}; "
        f"{len(prepared.operators)} operators"
    )
    learning = (
        f"{spec.iterations} iterations on groups of M = {spec.group} steps, {spec.gradient} gradient, "
        f"{spec.batch} of {spec.trajectories} trajectories each"
    )
    told = cost.told(free_memory(request.device))
    console.print(f"plan     {learning if prepared.operators else 'nothing to learn'}; {told}")
    with bar() as show:
        result = build(request, prepared, show)
    console.print(summary(request, result))
    facts = machine_facts()
    console.print(f"{facts['cpu']}, {facts['cores']} cores; seeds 0..{pictures - 1}; engine {result.comparison.engine}")
    console.print(f"bundle   {result.bundle.folder}")
    console.print(f"report   {result.report}")


def _tuned(request: Request, batch: int | None, earlier: Path | None) -> Request:
    """The request with decisions measured now, measured before it was interrupted, or taken from a file."""
    if batch is not None and earlier is not None:
        raise AccuQuantError("--tune measures and --tuned takes what was measured; leave one of them out")
    if request.scheme.nothing_quantized:
        raise AccuQuantError(f"{request.scheme.name} leaves everything in float already; export without --tune")
    kept = request.work / "tuning.json"
    if earlier is not None or (request.resume and kept.exists()):
        tuning = Tuning.load(earlier or kept)
    else:
        check_out(request.out)
        model, plan, guidance = load(request)
        shop = Workshop(model, plan, request.scheme, batch=batch or 1, guidance=guidance, table=request.time_table)
        with bar() as show:
            tuning = measure_tuning(shop, show)
    if tuning.target != request.scheme.target:
        raise AccuQuantError(f"{earlier} was tuned for target {tuning.target}, this is for {request.scheme.target}")
    in_float = (*request.scheme.in_float, *tuning.in_float)
    return replace(request, tuning=tuning, scheme=request.scheme.model_copy(update={"in_float": in_float}))


def _validated(model: Any, **values: Any) -> Any:
    """Build a pydantic model; its complaint becomes one sentence."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if first["loc"]:  # else it is about several of them together
            said = f"--{'.'.join(map(str, first['loc']))} {first['input']}: {said}"
        raise AccuQuantError(said) from error


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise AccuQuantError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if name not in {"cpu", "cuda"}:
        raise AccuQuantError(f"--device {name!r}; known: auto, cpu, cuda")
    return name


main = command(export)
