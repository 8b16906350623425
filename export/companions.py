"""What stands around a denoiser: a text encoder with its tokenizer or given rows, a latent model's decoder.

Networks among them stay in float, as they are: each is called once a picture, the denoiser once a step.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..calibrate.model import DiffusionModel, outputs_of
from ..runtime.bundle import CONDITIONS, TOKENIZER, ByText, NetworkName
from ..runtime.engines.base import EngineOptions
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.errors import AccuQuantError
from ..runtime.files import write_text
from ..runtime.rows import save_rows
from ..runtime.tokenizer import Tokenizer
from .graph import OPSET, save_graph
from .verify import check_graph

TOLERANCE = 1e-3  # of the output's root mean square: float32 in another order


def save_companions(model: DiffusionModel, folder: Path) -> dict[NetworkName, str]:
    """Write those the model has into `folder`; returns the graphs' names.

    Raises:
        AccuQuantError: a graph computes something else than its module.
    """
    written: dict[NetworkName, str] = {}
    known = model.conditioning
    if model.rows is not None:
        save_rows(folder / CONDITIONS, model.rows)
    if model.text is not None and isinstance(known, ByText):
        write_text(folder / TOKENIZER, model.text.tokenizer)
        tokens = Tokenizer(model.text.tokenizer, TOKENIZER)(["", *known.examples][:2])
        path = folder / "text_encoder.onnx"
        _save(model.text.network, "tokens", torch.from_numpy(tokens), path, known.inputs)
        written["text_encoder"] = "text_encoder.onnx"
    if model.decoder is not None:
        generator = torch.Generator().manual_seed(0)
        _save(
            model.decoder, "latent", torch.randn(2, *model.sample_shape, generator=generator), folder / "decoder.onnx"
        )
        written["decoder"] = "decoder.onnx"
    return written


@torch.no_grad()
def _save(network: nn.Module, name: str, example: Tensor, path: Path, outputs: Sequence[str] = ("output",)) -> None:
    """The graph of a module of one input `name`, its batch axis dynamic; `example` has two rows."""
    device = next(network.parameters()).device
    model = _trace(network, name, example.to(device), outputs)
    save_graph(model, path)
    check_graph(path)
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=len(example)))
    made = engine.run_all({name: example.numpy()})
    engine.close()
    for wanted, found in zip(outputs_of(network, example.to(device)), made, strict=True):
        expected = wanted.cpu().numpy()
        error = float(np.abs(found - expected).max() / np.sqrt(np.square(expected).mean()))
        if not error <= TOLERANCE:
            raise AccuQuantError(f"the exported {path.stem} differs from the model by {error:.1e} of its scale")


def _trace(network: nn.Module, name: str, example: Tensor, outputs: Sequence[str]) -> ir.Model:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of torchvision's absence, which is no concern of ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (example,), dynamo=True, opset_version=OPSET, input_names=[name], output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},), verbose=False,
            )  # fmt: skip
    finally:
        logger.setLevel(level)
    assert program is not None
    program.model.producer_name, program.model.producer_version = "accuquant", None
    return program.model
