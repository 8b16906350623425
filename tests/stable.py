"""A small Stable Diffusion in one file: golden denoisers, a text encoder and a first stage, with weights by formula."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from accuquant.calibrate.families.first_stage import Decoder, Network
from safetensors.torch import save_file
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

GOLDEN = json.loads((Path(__file__).parent / "calibrate" / "families" / "golden_sd.json").read_text())
WIDTH = 64  # of the text encoder


def tokenizer(length=8, size=60):
    library = Library(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    library.pre_tokenizer = Whitespace()
    library.enable_padding(length=length, pad_id=0, pad_token="w0")
    library.enable_truncation(length)
    return library.to_str()


def weights(formula, shapes):
    return formula.formula_weights({name: torch.empty(shape) for name, shape in shapes.items()})


def whole(formula, version):
    """A file's weights; the denoiser reads a context of WIDTH, but no more of it than the golden one."""
    state = weights(formula, GOLDEN["unets"][version]["state"])
    for name, value in state.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name] = F.pad(value, (0, WIDTH - value.shape[1]))
    narrower = {128: WIDTH, 384: 3 * WIDTH, 512: 4 * WIDTH}
    shapes = {k: [narrower.get(n, n) for n in shape] for k, shape in GOLDEN["texts"][version]["state"].items()}
    with torch.device("meta"):
        stage = Decoder(Network(4, [32, 64], 1, set(), 3), nn.Conv2d(4, 4, 1), None, 1.0, 0.0).state_dict()
    shapes |= {f"first_stage_model.{k}": list(v.shape) for k, v in stage.items()}
    return state | weights(formula, shapes)


def context(formula, version):
    """The golden denoiser's, widened."""
    made = formula.formula_input(GOLDEN["unets"][version]["context"])
    return F.pad(made, (0, WIDTH - made.shape[2]))


def settings(version, **changed):
    params = {"linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "scale_factor": 0.18215, **changed}
    return {"model": {"params": {**params, "unet_config": {"params": GOLDEN["unets"][version]["unet"]}}}}


def save(folder, state, config=None, name="model.safetensors"):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 1}, path)
    if config is not None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    path.with_suffix(".tokenizer.json").write_text(tokenizer())
    return path
