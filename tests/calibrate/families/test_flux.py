"""Flux folders: what diffusers' pipeline computes with its own packing, positions, guidance and times."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuquant.calibrate.families import load_model
from accuquant.calibrate.trace import trace
from accuquant.runtime.errors import AccuQuantError
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file

SETTINGS = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
DEV = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


@pytest.fixture
def saved(formula, tmp_path):
    def make(guided, config="size: 8\nguidance: 2.5"):
        network = FluxTransformer2DModel(**SETTINGS, guidance_embeds=guided).eval()
        network.load_state_dict(formula.formula_weights(network.state_dict()))
        network.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
        told = {"context": formula.formula_input((2, 5, 12)), "pooled": formula.formula_input((2, 10))}
        save_file(told, tmp_path / "rows.safetensors")
        (tmp_path / "c.yml").write_text(config)
        model = load_model(tmp_path / "transformer", tmp_path / "c.yml", tmp_path / "rows.safetensors")
        return network, model, told

    return make


def theirs(network, x, t, told, guidance, divided=1000):
    """One call as FluxPipeline makes it: 2x2 values of every channel to a token, ids of none, row and column."""
    side = x.shape[2] // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros(side, side), rows, columns], dim=2).flatten(0, 1)
    made = network(
        hidden_states=F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        timestep=t / divided, guidance=guidance, pooled_projections=told["pooled"],
        encoder_hidden_states=told["context"], txt_ids=torch.zeros(5, 3), img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    return F.pixel_shuffle(made.transpose(1, 2).unflatten(2, (side, side)), 2)


@pytest.mark.parametrize("guided", [True, False])
def test_agrees_with_diffusers_as_its_pipeline_calls_it(guided, saved, formula):
    network, model, told = saved(guided)
    x = formula.formula_input((2, 4, 8, 8))
    guidance = torch.tensor([2.5, 2.5]) if guided else None
    with torch.no_grad():
        for t in (torch.tensor([617.0, 617.0]), torch.tensor([40.5, 40.5])):
            made = model.network(x, t, **told)
            torch.testing.assert_close(made, theirs(network, x, t, told, guidance), rtol=0, atol=1e-4)
            undivided = theirs(network, x, t, told, guidance, divided=1)
            assert (made - undivided).abs().max() > 1e-2  # as SD3 takes it, which would load and be wrong
        if guided:
            other = theirs(network, x, t, told, torch.tensor([3.5, 3.5]))
            assert (made - other).abs().max() > 1e-3
    assert model.sample_shape == (4, 8, 8)
    assert ("guidance 2.5 distilled" in model.found) == guided


@pytest.mark.parametrize("size", [8, 64, 128])
def test_the_shift_goes_by_the_pictures_size_as_in_the_pipeline(size, saved):
    """exp(mu) more noise for larger pictures, shares of noise from 1 to 1 / steps before that."""
    _, model, _ = saved(True, f"size: {size}")
    plan = trace(model.default_sampler, model.noise_schedule, 6)
    scheduler = FlowMatchEulerDiscreteScheduler(**DEV)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / 6, 6), mu=0.5 + (1.15 - 0.5) * ((size // 2) ** 2 - 256) / (4096 - 256)
    )
    assert [step.timestep for step in plan.steps] == pytest.approx([float(t) for t in scheduler.timesteps], rel=1e-6)
    shares = [float(s) for s in scheduler.sigmas]
    assert [step.b[i] for i, step in enumerate(plan.steps)] == pytest.approx(
        [after - before for before, after in itertools.pairwise(shares)], rel=1e-6
    )


def test_the_schnell_model_takes_four_steps_that_are_not_shifted(saved):
    _, model, _ = saved(False)
    plan = trace(model.default_sampler, model.noise_schedule, model.default_steps)
    assert [step.timestep for step in plan.steps] == [1000.0, 750.0, 500.0, 250.0]


def test_the_size_of_dev():
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(11901.41, abs=0.01)


@pytest.mark.parametrize(
    ("config", "words"), [("size: 7", "size: Input should be a multiple of 2"), ("steps: 3", "size, guidance")]
)
def test_choices_that_are_none_are_named(config, words, saved):
    with pytest.raises(AccuQuantError, match=words):
        saved(True, config)
