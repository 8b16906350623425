"""A bundle as models of Triton Inference Server: what a repository holds.

    REPOSITORY/<name>/           the whole sampling loop: seeds in, pictures out
    REPOSITORY/<name>-previews/  the same, decoupled: every few steps what the network sees, then the picture
    REPOSITORY/<name>-denoiser/  the quantized network alone, for loops of one's own

The first two are Python models of three lines; their code is `triton_model` of the installed package, so that the
server's Python needs `accuquant` with an engine, and a repository holds data and no program. A repository that has the
model gets its next version: a server that is told to load it changes over and loses no request.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, ByClass, ByText
from ..engines.base import Port
from ..errors import AccuQuantError
from ..files import atomic_folder, write_text
from ..pipeline import Pipeline
from .pbtxt import Word, render

MODEL = '''"""The sampling loop of the bundle beside this file; its code is the installed package's."""

from accuquant.runtime.serve.triton_model import TritonPythonModel  # noqa: F401 (Triton looks for this name)
'''
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class Serving:
    """How the server is to run a bundle.

    Every call computes `batch` rows, since an engine of another batch might round otherwise: with one batch for all, a
    picture is the same whoever else is in it. Requests wait `delay` seconds at most for others to join them; more than
    `queue` waiting ones are refused, and those that were not begun within `deadline` seconds. `previews` is the number
    of steps between two of them, 0: no such model. `plans` are TensorRT's, by compute capability; the denoiser then
    runs on those instead of ONNX Runtime.
    """

    name: str
    batch: int = 8
    instances: int = 1
    delay: float = 0.01
    queue: int = 64
    deadline: float = 60.0
    threads: int = 0
    engine: str = "auto"
    guidance: float | None = None
    previews: int = 0
    denoiser: bool = False
    plans: Mapping[str, Path] = field(default_factory=dict)


def write_repository(bundle: Bundle, out: Path, serving: Serving) -> list[Path]:
    """Write the models of a bundle into repository `out`; returns their version folders.

    The bundle is opened once, to ask its engine for names and shapes.

    Raises:
        AccuQuantError: the bundle does not open on this machine, a plan is missing, or `out` cannot be written.
    """
    if not serving.name or "/" in serving.name or serving.name.startswith("."):
        raise AccuQuantError(
            f"{serving.name!r} is no name for a model; choose one of letters, digits, - and _ (--name)"
        )
    for plan in serving.plans.values():
        if not plan.is_file():
            raise AccuQuantError(f"{plan} does not exist; write --plan 8.9=FILE with a plan that TensorRT built")
    with Pipeline(bundle, engine=serving.engine, batch=1, threads=serving.threads, guidance=serving.guidance) as opened:
        guided = opened.denoiser.is_guided
        inputs, outputs = opened.engine.inputs, opened.engine.outputs
        picture = opened.pictures(np.zeros((1, *opened.shape), np.float32)).shape[1:]
    written = [_write_sampler(bundle, out, serving, picture, guided, 0)]
    if serving.previews:
        written.append(_write_sampler(bundle, out, serving, picture, guided, serving.previews))
    if serving.denoiser or serving.plans:
        written.append(_write_denoiser(bundle, out, serving, inputs, outputs))
    return written


def _write_sampler(
    bundle: Bundle, out: Path, serving: Serving, picture: tuple[int, ...], guided: bool, previews: int
) -> Path:
    name = serving.name + ("-previews" if previews else "")
    settings = {"engine": serving.engine, "threads": str(serving.threads), "previews": str(previews)}
    if serving.guidance is not None:
        settings["guidance"] = repr(serving.guidance)
    config = _common(bundle, name, serving) | {
        "backend": "python",
        "input": _wishes(bundle, guided),
        "output": [{"name": "picture", "data_type": Word("TYPE_UINT8"), "dims": list(picture)}],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in settings.items()],
        # The model is ready when its first picture is painted: everything is compiled by then.
        "model_warmup": [
            {
                "name": "picture",
                "batch_size": 1,
                "inputs": [
                    {"key": "seed", "value": {"data_type": Word("TYPE_UINT64"), "dims": [1], "zero_data": True}},
                ],
            }
        ],
    }
    if previews:
        config["output"].append({"name": "step", "data_type": Word("TYPE_INT32"), "dims": [1]})
        config["model_transaction_policy"] = {"decoupled": True}
    version = _next_version(out / name)
    with atomic_folder(version) as part:
        (part / "model.py").write_text(MODEL)
        shutil.copytree(bundle.folder, part / "bundle", copy_function=_link_or_copy)
    _write_config(out / name, config)
    return version


def _write_denoiser(
    bundle: Bundle, out: Path, serving: Serving, inputs: tuple[Port, ...], outputs: tuple[Port, ...]
) -> Path:
    name = f"{serving.name}-denoiser"
    files = [bundle.folder / file for file in bundle.manifest.networks["denoiser"].files]
    config = _common(bundle, name, serving) | {
        "backend": "tensorrt" if serving.plans else "onnxruntime",
        "default_model_filename": files[0].name,
        "input": [_tensor(port) for port in inputs],
        "output": [_tensor(port) for port in outputs],
    }
    if serving.threads and not serving.plans:
        counted = {"key": "intra_op_thread_count", "value": {"string_value": str(serving.threads)}}
        config["parameters"] = [counted]
    if serving.plans:
        named = {capability: f"{capability}.plan" for capability in serving.plans}
        config["cc_model_filenames"] = [{"key": key, "value": value} for key, value in named.items()]
        config["default_model_filename"] = next(iter(named.values()))
    version = _next_version(out / name)
    with atomic_folder(version) as part:
        for file in [] if serving.plans else files:
            _link_or_copy(file, part / file.name)
        for capability, plan in serving.plans.items():
            _link_or_copy(plan, part / f"{capability}.plan")
    _write_config(out / name, config)
    return version


def _common(bundle: Bundle, name: str, serving: Serving) -> dict[str, Any]:
    on_gpu = bundle.manifest.target == "tensorrt" or serving.plans
    return {
        "name": name,
        "max_batch_size": serving.batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"count": serving.instances, "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(serving.delay * 1e6),
            "default_queue_policy": {
                "max_queue_size": serving.queue,
                "default_timeout_microseconds": round(serving.deadline * 1e6),
                "allow_timeout_override": True,
            },
        },
    }


def _wishes(bundle: Bundle, guided: bool) -> list[dict[str, Any]]:
    """The sampler's inputs: a seed, and what else this network can be asked for."""
    known = bundle.manifest.conditioning
    optional = {"steps": "TYPE_INT32"}
    if isinstance(known, ByClass):
        optional["class"] = "TYPE_INT64"
    if isinstance(known, ByText):
        optional["prompt"] = "TYPE_STRING"
    if guided:
        optional |= {"guidance": "TYPE_FP32"} | ({"negative_prompt": "TYPE_STRING"} if "prompt" in optional else {})
    seed = {"name": "seed", "data_type": Word("TYPE_UINT64"), "dims": [1]}
    return [seed] + [
        {"name": name, "data_type": Word(kind), "dims": [1], "optional": True} for name, kind in optional.items()
    ]


def _tensor(port: Port) -> dict[str, Any]:
    """A graph's input or output; of those with nothing but a batch, Triton wants one dimension and takes it away."""
    described: dict[str, Any] = {"name": port.name, "data_type": Word(TYPES[port.dtype.name])}
    sides = list(port.shape[1:])
    return described | ({"dims": sides} if sides else {"dims": [1], "reshape": {}})


def _next_version(folder: Path) -> Path:
    versions = [int(found.name) for found in folder.glob("*") if found.name.isdecimal()]
    return folder / str(max(versions, default=0) + 1)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """After the version: a server that polls in between has the old description of the same tensors."""
    text = render(config)
    path = folder / "config.pbtxt"
    if not path.exists() or path.read_text() != text:  # a touched file alone would make it load everything anew
        write_text(path, text)


def _link_or_copy(source: Any, target: Any) -> None:
    """A second name for the same bytes where the disk allows it; bundles are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
