"""LoRA: every spelling changes the same weights by w alpha / rank up down; what finds no layer is an error."""

import json

import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.lora import METADATA, Lora, parse_lora, with_loras
from accuquant.runtime.errors import AccuQuantError
from safetensors.torch import save_file

RANK = 2
# diffusers' names of some layers, and where they are in the network's own.
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.1.proj_in": "output_blocks.3.1.proj_in",  # a 1x1 convolution
    "up_blocks.0.resnets.1.conv1": "output_blocks.1.0.in_layers.2",  # a 3x3 convolution
}
TEXT = {f"text_model.encoder.layers.1.{n}": f"encoder.layers.1.{n}" for n in ("self_attn.v_proj", "mlp.fc2")}


@pytest.fixture
def model(formula, stable, tmp_path):
    return load_model(stable.save(tmp_path, stable.whole(formula, "1"), stable.settings("1")))


def modules(model):
    """The layers above, by diffusers' names."""
    parts = {"unet": (model.network.unet, UNET), "text_encoder": (model.text.network, TEXT)}
    return {f"{part}.{k}": net.get_submodule(v) for part, (net, names) in parts.items() for k, v in names.items()}


def changes(model, generator=0):
    """down and up of every layer above, in the layer's shape."""
    random, made = torch.Generator().manual_seed(generator), {}
    for name, module in modules(model).items():
        out, *inside = module.weight.shape
        ones = [1] * (len(inside) - 1)
        made[name] = (
            torch.randn(RANK, *inside, generator=random),
            torch.randn(out, RANK, *ones, generator=random),
        )
    return made


def kohya(name):
    flat = name.replace(".", "_")
    return (
        flat.replace("unet_", "lora_unet_", 1) if flat.startswith("unet") else flat.replace("text_encoder", "lora_te")
    )


def old(name):
    """As diffusers wrote attention of U-Nets in 2023."""
    layer, _, inner = name.removesuffix(".0").rpartition(".")
    return f"{layer}.processor.{inner}_lora" if ".attn" in name and "unet." in name else f"{name}.lora_linear_layer"


SPELLINGS = {
    "kohya": lambda n: (f"{kohya(n)}.lora_down.weight", f"{kohya(n)}.lora_up.weight"),
    "PEFT": lambda n: (f"{n}.lora_A.weight", f"{n}.lora_B.weight"),
    "PEFT, adapter named": lambda n: (f"{n}.lora_A.default.weight", f"{n}.lora_B.default.weight"),
    "diffusers": lambda n: (f"{n}.lora.down.weight", f"{n}.lora.up.weight"),
    "diffusers, 2023": lambda n: (f"{old(n)}.down.weight", f"{old(n)}.up.weight"),
    "U-Net alone": lambda n: (
        f"{n.removeprefix('unet.').removeprefix('text_encoder.')}.lora_A.weight",
        f"{n.removeprefix('unet.').removeprefix('text_encoder.')}.lora_B.weight",
    ),
}


def write(folder, made, spelling="kohya", alpha=None, **metadata):
    state = {}
    for name, (down, up) in made.items():
        state |= dict(zip(SPELLINGS[spelling](name), (down, up), strict=True))
        if alpha is not None:
            state[f"{kohya(name)}.alpha"] = torch.tensor(float(alpha))
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, folder / "style.safetensors", metadata={METADATA: json.dumps(metadata)} if metadata else None)
    return folder / "style.safetensors"


def check(model, path, weight, scale):
    """That fusing changes exactly the layers above, and by how much."""
    made, layers = changes(model), modules(model)
    before = {k: v.clone() for net in (model.network, model.text.network) for k, v in net.state_dict().items()}
    places = {id(module): name for name, module in layers.items()}
    fused = with_loras(model, [Lora(path, weight)])
    assert f"LoRA style.safetensors x {weight:g} in {len(layers)} layers" in fused.found
    for net in (model.network, model.text.network):
        for name, module in net.named_modules():
            if not isinstance(getattr(module, "weight", None), torch.Tensor):
                continue
            expected = before[f"{name}.weight"]
            if id(module) in places:
                down, up = made[places[id(module)]]
                change = torch.einsum("or,r...->o...", up.flatten(1), down)
                expected = expected + weight * scale * change
            torch.testing.assert_close(module.weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_finds_its_layers(spelling, model, tmp_path):
    check(model, write(tmp_path, changes(model), spelling), 0.7, 1.0)


def test_alpha_scales_by_rank(model, tmp_path):
    check(model, write(tmp_path, changes(model), alpha=1), 0.5, 1 / RANK)


def test_alpha_may_stand_in_the_metadata(model, tmp_path):
    said = {f"{part}.{k}": v for part in ("unet", "text_encoder") for k, v in {"r": RANK, "lora_alpha": 6}.items()}
    check(model, write(tmp_path, changes(model), "PEFT", **said), 1.0, 6 / RANK)


def test_two_add_up(model, tmp_path):
    layer = modules(model)["unet.up_blocks.1.attentions.1.proj_in"]
    before = layer.weight.clone()
    path = write(tmp_path, changes(model))
    with_loras(model, [Lora(path, 0.75), Lora(path, -0.75)])
    torch.testing.assert_close(layer.weight, before, rtol=1e-5, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------


def missing(made):
    made["unet.down_blocks.7.attentions.0.proj_in"] = tuple(
        v.clone() for v in made["unet.up_blocks.1.attentions.1.proj_in"]
    )


def narrow(made):
    name = "unet.up_blocks.0.resnets.1.conv1"
    made[name] = (made[name][0][:, :-1], made[name][1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "2 of 16 keys find no layer in this model: lora_unet_down_blocks_7_attentions_0_proj_in.lora_down"),
        (narrow, "unet_up_blocks_0_resnets_1_conv1 changes 64x855 weights by rank 2, the model's are 64x864"),
        (lambda made: made.clear(), "0 of 0 keys are not there at all"),
    ],
)
def test_what_does_not_fit_is_named(change, words, model, tmp_path):
    made = changes(model)
    change(made)
    weight = modules(model)["unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"].weight
    with pytest.raises(AccuQuantError) as error:
        with_loras(model, [Lora(write(tmp_path, made))])
    assert words in str(error.value)
    assert torch.isfinite(weight).all()


def test_a_kind_that_is_no_product_of_two_is_refused(model, tmp_path):
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "loha.safetensors")
    with pytest.raises(AccuQuantError, match="hada_w1_a; it belongs to another kind of model, or is of a kind that"):
        with_loras(model, [Lora(tmp_path / "loha.safetensors")])


def test_a_half_alone_is_refused(model, tmp_path):
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "l.safetensors"
    )
    with pytest.raises(AccuQuantError, match="lack their other half"):
        with_loras(model, [Lora(tmp_path / "l.safetensors")])


def test_settings_that_change_the_sum_are_refused(model, tmp_path):
    path = write(tmp_path, changes(model), "PEFT", **{"unet.use_dora": True})
    with pytest.raises(AccuQuantError, match="its unet was trained with use_dora"):
        with_loras(model, [Lora(path)])


def test_models_without_layers_for_it_are_named(tiny, tmp_path):
    other = load_model(tiny.save_checkpoint(tmp_path, tiny.unet()))
    with pytest.raises(AccuQuantError, match="'ddim' take no LoRA"):
        with_loras(other, [Lora(tmp_path / "style.safetensors")])


def test_a_weight_stands_behind_a_colon():
    assert parse_lora("a/style.safetensors") == Lora(parse_lora("a/style.safetensors").path, 1.0)
    assert parse_lora("C:/style.safetensors:0.8").weight == 0.8
    assert parse_lora("C:/style.safetensors").path.name == "style.safetensors"
    with pytest.raises(AccuQuantError, match="out of range"):
        parse_lora("style.safetensors:nan")
