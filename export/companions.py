"""The networks around a denoiser: a text encoder with its tokenizer, a latent model's decoder. In float, as they are.

Each is called once a picture where the denoiser is called once a step.
"""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..calibrate.model import DiffusionModel
from ..runtime.bundle import TOKENIZER, NetworkName
from ..runtime.engines.base import EngineOptions
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.errors import AccuQuantError
from ..runtime.files import write_text
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
    if model.text is not None:
        write_text(folder / TOKENIZER, model.text.tokenizer)
        texts = ["", *getattr(model.conditioning, "examples", ())][:2]
        tokens = Tokenizer(model.text.tokenizer, TOKENIZER)(texts)
        _save(model.text.network, "tokens", torch.from_numpy(tokens), folder / "text_encoder.onnx")
        written["text_encoder"] = "text_encoder.onnx"
    if model.decoder is not None:
        generator = torch.Generator().manual_seed(0)
        _save(
            model.decoder, "latent", torch.randn(2, *model.sample_shape, generator=generator), folder / "decoder.onnx"
        )
        written["decoder"] = "decoder.onnx"
    return written


@torch.no_grad()
def _save(network: nn.Module, name: str, example: Tensor, path: Path) -> None:
    """The graph of a module of one input `name`, its batch axis dynamic; `example` has two rows."""
    device = next(network.parameters()).device
    model = _trace(network, name, example.to(device))
    save_graph(model, path)
    check_graph(path)
    expected = network(example.to(device)).cpu().numpy()
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=len(example)))
    made = engine.run({name: example.numpy()})
    error = float(np.abs(made - expected).max() / np.sqrt(np.square(expected).mean()))
    engine.close()
    if not error <= TOLERANCE:
        raise AccuQuantError(f"the exported {path.stem} differs from the model by {error:.1e} of its scale")


def _trace(network: nn.Module, name: str, example: Tensor) -> ir.Model:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of torchvision's absence, which is no concern of ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (example,), dynamo=True, opset_version=OPSET, input_names=[name], output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},), verbose=False,
            )  # fmt: skip
    finally:
        logger.setLevel(level)
    assert program is not None
    program.model.producer_name, program.model.producer_version = "accuquant", None
    return program.model
