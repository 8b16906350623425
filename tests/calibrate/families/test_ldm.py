"""Latent diffusion: the authors' own numbers from file to output and to pixels, a sentence for what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accuquant.calibrate.families import adm, ldm, ldm_facts, load_model
from accuquant.calibrate.families.adm_unet import AdmConfig, AdmUNet
from accuquant.calibrate.families.first_stage import load_decoder
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.export.graph import operator_nodes, trace_float
from accuquant.runtime.bundle import ByClass
from accuquant.runtime.errors import AccuQuantError
from torch import nn

GOLDEN = json.loads((Path(__file__).parent / "golden_ldm.json").read_text())
CASES, STAGES = GOLDEN["cases"], GOLDEN["first_stages"]
CLASSES = "classes, heads of 16, two deep"
PLAIN = "unconditional, legacy qkv"


def weights(formula, case):
    return formula.formula_weights({name: torch.empty(shape) for name, shape in case["state"].items()})


def settings(case, **changed):
    params = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "scale_factor": 0.5}
    return {"model": {"params": {**params, **changed, "unet_config": {"params": case["unet"]}}}}


def checkpoint(folder, state, config):
    """As Lightning writes it, but for what it writes besides."""
    torch.save({"state_dict": state, "global_step": 3}, folder / "model.ckpt")
    if config is not None:
        (folder / "model.yaml").write_text(yaml.safe_dump(config))
    return folder / "model.ckpt"


def output(network, formula, case):
    given = {"y": torch.tensor(case["classes"])} if "classes" in case else {}
    with torch.no_grad():
        return network(formula.formula_input((2, 3, 8, 8)), torch.tensor([0.0, 617.0]), **given).numpy().ravel()


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_authors_code(name, formula, tmp_path):
    """1e-4 on outputs of order 1: only the order of float32 sums may differ."""
    case = CASES[name]
    model = load_model(checkpoint(tmp_path, weights(formula, case), settings(case)))
    assert model.family == "ldm"
    assert model.sample_shape == (3, 8, 8)
    np.testing.assert_allclose(output(model.network, formula, case), case["output"], rtol=0, atol=1e-4)


def decoder(formula, name):
    return load_decoder(weights(formula, STAGES[name]), 0.5, Path("model.ckpt"))


def pixels(network, formula, name):
    with torch.no_grad():
        return network(formula.formula_input((2, STAGES[name]["channels"], 8, 8)))[:, :, ::3, ::3].numpy().ravel()


@pytest.mark.parametrize("name", STAGES)
def test_first_stages_agree_with_the_authors_code(name, formula):
    np.testing.assert_allclose(pixels(decoder(formula, name), formula, name), STAGES[name]["output"], rtol=0, atol=1e-4)


def norms(network):
    return [m for m in network.modules() if isinstance(m, nn.GroupNorm)]


def test_a_wrong_epsilon_in_the_first_stage_would_be_seen(formula):
    """With weights of another size it would be far more than here."""
    network = decoder(formula, "KL")
    for module in norms(network):
        module.eps = 1e-5
    assert np.abs(pixels(network, formula, "KL") - STAGES["KL"]["output"]).max() > 1e-6
    assert {module.eps for module in norms(decoder(formula, "KL"))} == {1e-6}


def test_norms_have_the_epsilons_of_the_original(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, weights(formula, CASES[CLASSES]), settings(CASES[CLASSES])))
    found = {n: m.eps for n, m in model.network.named_modules() if isinstance(m, nn.GroupNorm)}
    assert {eps for name, eps in found.items() if name.endswith(".norm")} == {1e-6}
    assert {eps for name, eps in found.items() if not name.endswith(".norm")} == {1e-5}


def test_the_wrong_half_of_the_gate_would_be_seen(formula, tmp_path):
    case = CASES[CLASSES]
    state = weights(formula, case)
    for name in [k for k in state if ".ff.net.0.proj." in k]:
        state[name] = torch.cat(state[name].chunk(2)[::-1])
    model = load_model(checkpoint(tmp_path, state, settings(case)))
    assert np.abs(output(model.network, formula, case) - case["output"]).max() > 1e-2


def test_the_wrong_qkv_order_would_be_seen(formula, tmp_path, monkeypatch):
    case = CASES[PLAIN]
    monkeypatch.setattr(ldm.adm, "sort_qkv", lambda rows, config: rows)
    model = load_model(checkpoint(tmp_path, weights(formula, case), settings(case)))
    assert np.abs(output(model.network, formula, case) - case["output"]).max() > 1e-2


def test_averaged_weights_are_taken_where_they_are(formula, tmp_path):
    case = CASES[PLAIN]
    state = weights(formula, case)
    averaged = {"model_ema." + k.removeprefix("model.").replace(".", ""): v for k, v in state.items()}
    damaged = {k: torch.zeros_like(v) for k, v in state.items()}
    model = load_model(checkpoint(tmp_path, damaged | averaged, settings(case)))
    assert "(EMA)" in model.found
    np.testing.assert_allclose(output(model.network, formula, case), case["output"], rtol=0, atol=1e-4)


def test_latents_become_pictures_by_the_files_own_scale(formula, tmp_path):
    case, stage = CASES[PLAIN], STAGES["VQ, attention"]
    state = weights(formula, case) | {f"first_stage_model.{k}": v for k, v in weights(formula, stage).items()}
    model = load_model(checkpoint(tmp_path, state, settings(case)))
    np.testing.assert_allclose(pixels(model.decoder, formula, "VQ, attention"), stage["output"], rtol=0, atol=1e-4)
    other = load_model(checkpoint(tmp_path, state | {"scale_factor": torch.tensor(0.25)}, settings(case)))
    assert other.decoder.scale == 0.25


def test_the_last_class_stands_for_none(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, weights(formula, CASES[CLASSES]), settings(CASES[CLASSES])))
    assert model.conditioning == ByClass(classes=5, null=5, guidance=ldm.GUIDANCE)


def test_the_schedule_is_linear_in_its_root_and_timesteps_begin_at_one(formula, tmp_path):
    model = load_model(
        checkpoint(tmp_path, weights(formula, CASES[PLAIN]), settings(CASES[PLAIN], parameterization="v"))
    )
    assert model.noise_schedule["beta_schedule"] == "scaled_linear"
    assert model.noise_schedule["steps_offset"] == 1
    assert model.noise_schedule["prediction_type"] == "v_prediction"


def test_every_operator_has_a_role_and_reaches_the_graph(formula, tmp_path):
    model = load_model(checkpoint(tmp_path, weights(formula, CASES[CLASSES]), settings(CASES[CLASSES])))
    operators = quantize(model, QuantScheme(weight_bits=4, activation_bits=8, policy="integer"))
    roles = {name: operator.role for name, operator in operators.items()}
    assert roles["unet.input_blocks.0.0"] == "first"
    assert roles["unet.out.2"] == "last"
    assert roles["unet.time_embed.0"] == "time"
    assert roles["unet.middle_block.1.transformer_blocks.1.attn2.qk"] == "attention"
    assert roles["unet.middle_block.1.transformer_blocks.0.ff.net.0.proj"] == "body"
    assert model.block_of("unet.output_blocks.1.1.transformer_blocks.0.attn1.to_q") == "unet.output_blocks.1.1"
    graph = trace_float(model.network, operators, model.sample_shape, model.condition([0]))
    assert operators.keys() <= operator_nodes(graph).keys()


@pytest.mark.parametrize(("key", "known"), ldm_facts.PUBLISHED.items())
def test_the_published_models_are_known_by_their_keys(key, known, tmp_path):
    """At full shape on meta tensors; millions of parameters as published where they are."""
    channels, mult, context = key
    facts = known.facts
    levels, church, stable = len(mult), "churches" in known.name, "Stable" in known.name
    with torch.device("meta"):
        network = AdmUNet(
            AdmConfig(
                4 if stable else 3, 4 if stable else 3, channels, mult, 2,
                (0, 1, 2) if stable else tuple(range(4)) if church else tuple(range(1, levels)),
                head_channels=facts.num_head_channels, heads=facts.num_heads if facts.num_heads > 0 else None,
                resblock_updown=church, scale_shift_norm=church, context=context, linear_projection=context == 1024,
            )
        )  # fmt: skip
    found = adm.shape_from_keys(network.state_dict(), tmp_path / "m.ckpt")
    assert (found["model_channels"], found["channel_mult"]) == (channels, mult)
    assert found["resblock_updown"] == found["scale_shift_norm"] == church
    read = ldm_facts.read_facts(tmp_path / "m.ckpt", None, found, context)
    assert read == (facts, f"the published {known.name}", known.otherwise)
    ldm_facts.check_facts(network.config, facts, known.name)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    published = {
        (224, None): 274.06, (192, 512): 400.92 - 1001 * 512 / 1e6, (320, 768): 859.52, (320, 1024): 865.91,
    }  # fmt: skip
    assert church or millions == pytest.approx(published[channels, context], rel=1e-4 if stable else 2e-3)


# -- what is refused -------------------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(AccuQuantError) as error:
        load_model(path)
    return str(error.value)


def test_a_context_that_nothing_makes_is_refused(formula, tmp_path):
    state = weights(formula, CASES[CLASSES])
    del state["cond_stage_model.embedding.weight"]
    assert "neither an embedding of classes nor a text encoder" in refusal(
        checkpoint(tmp_path, state, settings(CASES[CLASSES]))
    )


def test_a_file_without_its_yaml_says_what_is_missing(formula, tmp_path):
    path = checkpoint(tmp_path, weights(formula, CASES[PLAIN]), None)
    assert "put its training's YAML beside it as model.yaml" in refusal(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (settings({"unet": {"num_heads": 5}}), "num_heads 5 does not divide the 64 channels of level 1"),
        (settings({"unet": {"num_heads": 4}}, image_size=9), "image_size 9 cannot be halved 1 times"),
        (settings({"unet": {"num_heads": 4}}, linear_start=-1.0), "linear_start"),
        (settings({"unet": {"num_heads": 4}}, parameterization="z"), "parameterization 'z'"),
        ({"model": 3}, "has no model.params.unet_config.params"),
        ("text", "has no model.params.unet_config.params"),
    ],
)
def test_settings_that_do_not_fit_are_named(formula, tmp_path, config, words):
    assert words in refusal(checkpoint(tmp_path, weights(formula, CASES[PLAIN]), config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("model.diffusion_model.input_blocks.1.0.in_layers.2.weight"), "does not fit the network"),
        (lambda s: s["model.diffusion_model.out.2.bias"].fill_(float("nan")), "not finite in out.2.bias"),
        (lambda s: s.update({"first_stage_model.encoder.x": torch.zeros(1)}), "no AutoencoderKL or VQModelInterface"),
    ],
)
def test_damaged_weights_are_named(formula, tmp_path, change, words):
    state = weights(formula, CASES[PLAIN])
    change(state)
    assert words in refusal(checkpoint(tmp_path, state, settings(CASES[PLAIN])))
