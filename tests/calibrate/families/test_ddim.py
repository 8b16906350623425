"""The DDIM family: the authors' own numbers, and a sentence for everything that can be wrong with a checkpoint."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accuquant.calibrate.families import load_model
from accuquant.calibrate.families.ddim import recognise, role_of
from accuquant.calibrate.families.ddim_unet import UNet, UNetConfig, timestep_embedding
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.scheme import QuantScheme
from accuquant.runtime.errors import AccuQuantError
from safetensors.torch import save_file

GOLDEN = json.loads((Path(__file__).parent / "golden_ddim.json").read_text())["cases"]


def golden_network(case: dict, formula) -> UNet:
    config = UNetConfig(
        resolution=case["size"],
        in_channels=case["channels"],
        out_ch=case["channels"],
        ch=case["ch"],
        ch_mult=tuple(case["ch_mult"]),
        num_res_blocks=case["num_res_blocks"],
        attn_resolutions=tuple(case["attn_resolutions"]),
        resamp_with_conv=case["resamp"],
    )
    network = UNet(config).eval()
    network.load_state_dict(formula.formula_weights(network.state_dict()))
    return network


def output(network: UNet, case: dict, formula) -> np.ndarray:
    x = formula.formula_input((2, case["channels"], case["size"], case["size"]))
    with torch.no_grad():
        return network(x, torch.tensor([0.0, 617.0])).numpy()


@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_the_authors_code(name, formula):
    """1e-4 on outputs of order 1: float32 sums in another order, nothing else, may differ."""
    case = GOLDEN[name]
    got = output(golden_network(case, formula), case, formula)
    np.testing.assert_allclose(got.ravel(), case["output"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_names_and_shapes_are_the_authors(name, formula):
    state = golden_network(GOLDEN[name], formula).state_dict()
    names = "\n".join(f"{n} {list(v.shape)}" for n, v in sorted(state.items()))
    assert hashlib.sha256(names.encode()).hexdigest() == GOLDEN[name]["layout"]


@pytest.mark.parametrize("name", GOLDEN)
def test_loading_recovers_the_network_from_its_keys(name, tmp_path, formula):
    """From file to output: the shape is read off the keys, the picture's size off the YAML."""
    case = GOLDEN[name]
    torch.save(golden_network(case, formula).state_dict(), tmp_path / "m.ckpt")
    (tmp_path / "m.yml").write_text(yaml.safe_dump({"data": {"image_size": case["size"]}}))
    model = load_model(tmp_path / "m.ckpt")
    assert model.sample_shape == (case["channels"], case["size"], case["size"])
    np.testing.assert_allclose(output(model.network, case, formula).ravel(), case["output"], rtol=0, atol=1e-4)


def test_embedding_is_sines_then_cosines():
    got = timestep_embedding(torch.tensor([0.0, 10.0]), 8)
    rate = 10000.0 ** (-np.arange(4) / 3)
    np.testing.assert_allclose(got[0].numpy(), [0] * 4 + [1] * 4, atol=1e-7)
    np.testing.assert_allclose(got[1].numpy(), np.concatenate([np.sin(10 * rate), np.cos(10 * rate)]), atol=1e-5)
    assert timestep_embedding(torch.zeros(1), 9).shape == (1, 9)


# -- what is found ---------------------------------------------------------------------------------------------------


def test_the_tiny_checkpoint_loads_as_it_was_saved(tiny, tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    assert model.family == "ddim"
    assert model.sample_shape == (1, 8, 8)
    assert model.network.config == tiny.CONFIG
    assert dict(model.noise_schedule) == tiny.NOISE_SCHEDULE
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    for word in ("1x8x8", "0.70 M", "tiny.yml"):
        assert word in model.found
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3.0, 70.0])
    with torch.no_grad():
        assert torch.equal(model.network(x, t), tiny.unet()(x, t))


def test_safetensors_is_the_same_model(tiny, tiny_checkpoint):
    path = tiny_checkpoint.with_suffix(".safetensors")
    save_file(tiny.unet().state_dict(), path)
    one, other = load_model(path).network.state_dict(), load_model(tiny_checkpoint).network.state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_training_checkpoint_gives_its_ema_weights(tiny, tiny_checkpoint):
    """[model, optimizer, epoch, step, ema]: the last one samples best, and is the one to take."""
    raw, ema = tiny.unet(1).state_dict(), tiny.unet(2).state_dict()
    torch.save([raw, {"state": {}, "param_groups": []}, 3, 1000, ema], tiny_checkpoint)
    loaded = load_model(tiny_checkpoint).network.state_dict()
    assert all(torch.equal(loaded[k], ema[k]) for k in ema)


def test_data_parallel_prefix_is_taken_off(tiny, tiny_checkpoint):
    state = tiny.unet(2).state_dict()
    torch.save({f"module.{k}": v for k, v in state.items()}, tiny_checkpoint)
    loaded = load_model(tiny_checkpoint).network.state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_half_precision_weights_become_float32(tiny, tiny_checkpoint):
    torch.save({k: v.half() for k, v in tiny.unet().state_dict().items()}, tiny_checkpoint)
    assert {p.dtype for p in load_model(tiny_checkpoint).network.parameters()} == {torch.float32}


def test_configuration_can_be_named(tiny, tiny_checkpoint, tmp_path):
    other = tmp_path / "other.yml"
    other.write_text(yaml.safe_dump({"data": {"image_size": 16}, "diffusion": {"num_diffusion_timesteps": 500}}))
    model = load_model(tiny_checkpoint, other)
    assert model.sample_shape == (1, 16, 16)
    assert model.noise_schedule["num_train_timesteps"] == 500
    assert "other.yml" in model.found


def test_yaml_and_yml_are_both_found(tiny_checkpoint):
    tiny_checkpoint.with_suffix(".yml").rename(tiny_checkpoint.with_suffix(".yaml"))
    assert "tiny.yaml" in load_model(tiny_checkpoint).found


@pytest.mark.slow
def test_the_published_cifar_network_needs_no_yaml(tmp_path):
    config = UNetConfig(32, 3, 3, 128, (1, 2, 2, 2), 2, (16,))
    torch.save(UNet(config).state_dict(), tmp_path / "model-790000.ckpt")
    model = load_model(tmp_path / "model-790000.ckpt")
    assert model.sample_shape == (3, 32, 32)
    assert "CIFAR-10" in model.found
    assert model.noise_schedule["num_train_timesteps"] == 1000


# -- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1), "step": 3},
        {},
        [torch.ones(1), torch.ones(1)],
        torch.ones(3),
        "just a string",
        None,
        [1, 2, 3, 4, 5],
        {1: torch.ones(1)},
    ],
    ids=lambda v: type(v).__name__,
)
def test_another_familys_file_is_refused_showing_what_it_holds(stored, tmp_path):
    torch.save(stored, tmp_path / "m.ckpt")
    with pytest.raises(AccuQuantError, match=r"of no known family .*known: ermongroup/ddim U-Net") as caught:
        load_model(tmp_path / "m.ckpt")
    if isinstance(stored, dict) and stored:
        assert str(next(iter(stored))) in str(caught.value)


def test_a_foreign_mapping_is_not_recognised():
    assert recognise({"conv_in.weight": torch.ones(1)}) is None
    assert recognise([1, 2, 3]) is None


def test_missing_yaml_says_where_to_put_it(tiny_checkpoint):
    tiny_checkpoint.with_suffix(".yml").unlink()
    with pytest.raises(AccuQuantError, match=r"YAML beside it as tiny\.yml, or name it with --config"):
        load_model(tiny_checkpoint)


def test_missing_named_configuration(tiny_checkpoint, tmp_path):
    with pytest.raises(AccuQuantError, match=r"nowhere\.yml"):
        load_model(tiny_checkpoint, tmp_path / "nowhere.yml")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tiny, tiny_checkpoint, value):
    state = tiny.unet().state_dict()
    state["mid.attn_1.q.bias"][3] = value
    torch.save(state, tiny_checkpoint)
    with pytest.raises(AccuQuantError, match=r"not finite in mid\.attn_1\.q\.bias"):
        load_model(tiny_checkpoint)


@pytest.mark.parametrize(
    "key",
    ["norm_out.weight", "mid.block_1.conv1.bias", "down.1.block.0.conv1.weight", "up.0.upsample.conv.weight", "extra"],
)
def test_missing_and_left_over_keys_are_named(tiny, tiny_checkpoint, key):
    state = tiny.unet().state_dict()
    if state.pop(key, None) is None:
        state[key] = torch.ones(1)
    torch.save(state, tiny_checkpoint)
    with pytest.raises(AccuQuantError) as caught:
        load_model(tiny_checkpoint)
    assert key in str(caught.value) or "level 1 of the network is missing" in str(caught.value)


@pytest.mark.parametrize("key", ["conv_in.weight", "temb.dense.0.weight", "conv_out.weight"])
def test_without_its_signature_keys_it_is_no_ddim_network(tiny, tiny_checkpoint, key):
    state = tiny.unet().state_dict()
    del state[key]
    torch.save(state, tiny_checkpoint)
    with pytest.raises(AccuQuantError, match="no known family"):
        load_model(tiny_checkpoint)


def test_a_weight_of_another_shape_is_named(tiny, tiny_checkpoint):
    state = tiny.unet().state_dict()
    state["mid.attn_1.q.weight"] = torch.ones(64, 32, 1, 1)
    torch.save(state, tiny_checkpoint)
    with pytest.raises(AccuQuantError, match=r"mid\.attn_1\.q\.weight"):
        load_model(tiny_checkpoint)


@pytest.mark.parametrize("size", [7, 0, -8, "8", 8.0, None, [8]])
def test_a_wrong_picture_size_is_refused(tiny_checkpoint, size):
    """7 cannot be halved; the rest are no sizes at all."""
    tiny_checkpoint.with_suffix(".yml").write_text(yaml.safe_dump({"data": {"image_size": size}}))
    with pytest.raises(AccuQuantError, match=r"tiny\.yml.*image_size"):
        load_model(tiny_checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "data:", "data: 8", "model: {ch: 32}", "{", "\x00", "a: b: c"])
def test_a_yaml_of_another_form_is_refused(tiny_checkpoint, text):
    tiny_checkpoint.with_suffix(".yml").write_text(text)
    with pytest.raises(AccuQuantError, match=r"tiny\.yml"):
        load_model(tiny_checkpoint)


@pytest.mark.parametrize(
    "diffusion",
    [
        7,
        [1],
        {"num_diffusion_timesteps": "many"},
        {"num_diffusion_timesteps": None},
        {"num_diffusion_timesteps": 0},
        {"beta_start": "small"},
        {"beta_end": None},
        {"beta_schedule": "cosine"},
    ],
    ids=str,
)
def test_a_wrong_diffusion_section_is_refused(tiny_checkpoint, diffusion):
    content = {"data": {"image_size": 8}, "diffusion": diffusion}
    tiny_checkpoint.with_suffix(".yml").write_text(yaml.safe_dump(content))
    with pytest.raises(AccuQuantError, match=r"tiny\.yml"):
        load_model(tiny_checkpoint)


def test_an_empty_diffusion_section_means_the_defaults(tiny_checkpoint):
    """`diffusion:` with nothing below it is None in YAML."""
    tiny_checkpoint.with_suffix(".yml").write_text("data:\n  image_size: 8\ndiffusion:\n")
    assert load_model(tiny_checkpoint).noise_schedule["num_train_timesteps"] == 1000


def test_learned_variance_is_refused(tiny, tiny_checkpoint):
    state = tiny.unet().state_dict()
    state["conv_out.weight"] = state["conv_out.weight"].repeat(2, 1, 1, 1)
    state["conv_out.bias"] = state["conv_out.bias"].repeat(2)
    torch.save(state, tiny_checkpoint)
    with pytest.raises(AccuQuantError, match="1 channels in and 2 out; a learned variance"):
        load_model(tiny_checkpoint)


# -- roles -----------------------------------------------------------------------------------------------------------


def test_role_of_every_operator(tiny):
    scheme = QuantScheme(weight_bits=4, activation_bits=8, policy="integer")
    operators = quantize_operators(tiny.unet(), scheme, role_of)
    roles = {name: operator.role for name, operator in operators.items()}
    blocks = ["down.0.block.0", "down.1.block.0", "mid.block_1", "mid.block_2"]
    blocks += [f"up.{i}.block.{j}" for i in (0, 1) for j in (0, 1)]
    attentions = ["down.1.attn.0", "mid.attn_1", "up.1.attn.0", "up.1.attn.1"]
    expected = {"conv_in": "first", "conv_out": "last", "temb.dense.0": "time", "temb.dense.1": "time"}
    for b in blocks:
        expected |= {f"{b}.conv1": "body", f"{b}.conv2": "body", f"{b}.temb_proj": "time"}
        if b == "down.1.block.0" or b.startswith("up."):
            expected[f"{b}.nin_shortcut"] = "body"
    for a in attentions:
        expected |= {f"{a}.{p}": "body" for p in ("q", "k", "v", "proj_out")}
        expected |= {f"{a}.qk": "attention", f"{a}.av": "attention"}
    expected |= {"down.0.downsample.conv": "body", "up.1.upsample.conv": "body"}
    assert roles == expected
