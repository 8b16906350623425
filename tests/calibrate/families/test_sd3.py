"""Stable Diffusion 3 folders: what diffusers' pipeline computes, when, and under what."""

import itertools
import json

import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.trace import trace
from accuquant.runtime.bundle import ByRows
from accuquant.runtime.errors import AccuQuantError
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file

# As 3.5 has it in small: norms of queries and keys, and a block that attends twice.
SETTINGS = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 24, "pooled_projection_dim": 10,
    "pos_embed_max_size": 6, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
}  # fmt: skip


@pytest.fixture
def saved(formula, tmp_path):
    def make(config=None, **changes):
        network = SD3Transformer2DModel(**{**SETTINGS, **changes}).eval()
        network.load_state_dict(formula.formula_weights(network.state_dict()))
        network.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
        FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(tmp_path / "scheduler")
        index = {
            "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder_3": [None, None],
        }  # fmt: skip
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        told = {"context": formula.formula_input((2, 5, 16)), "pooled": formula.formula_input((2, 10))}
        save_file(told, tmp_path / "rows.safetensors")
        chosen = None
        if config is not None:
            chosen = tmp_path / "c.yml"
            chosen.write_text(config)
        return network, load_model(tmp_path, chosen, tmp_path / "rows.safetensors"), told

    return make


@pytest.mark.parametrize(("config", "size"), [(None, 8), ("size: 12", 12)])
def test_agrees_with_diffusers_as_its_pipeline_calls_it(config, size, saved, formula):
    """Its own size, and one that is cut out of the table of positions."""
    network, model, told = saved(config)
    x = formula.formula_input((2, 4, size, size))
    with torch.no_grad():
        for t in (torch.tensor([617.0, 617.0]), torch.tensor([40.5, 40.5])):
            theirs = network(
                hidden_states=x, timestep=t, encoder_hidden_states=told["context"],
                pooled_projections=told["pooled"], return_dict=False,
            )[0]  # fmt: skip
            torch.testing.assert_close(model.network(x, t, **told), theirs, rtol=0, atol=1e-4)
            thousandth = model.network(x, t / 1000, **told)
            assert (thousandth - theirs).abs().max() > 1e-2  # as Flux takes it, which would load and be wrong
    assert model.sample_shape == (4, size, size)


def test_without_rows_for_none_there_is_no_guidance(saved):
    _, model, _ = saved()
    assert model.conditioning == ByRows(shapes={"context": (5, 16), "pooled": (10,)}, guidance=1.0)
    with pytest.raises(AccuQuantError, match="nothing that stands for none"):
        model.guided(2.0)


def test_the_plan_is_the_folders_scheduler(saved):
    """Shifted shares of noise, t a thousand times those: x' = x + (s' - s) o."""
    _, model, _ = saved()
    plan = trace(model.default_sampler, model.noise_schedule, 7)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    scheduler.set_timesteps(7)
    assert [step.timestep for step in plan.steps] == [float(t) for t in scheduler.timesteps]
    shares = [float(s) for s in scheduler.sigmas]
    assert [step.b[i] for i, step in enumerate(plan.steps)] == pytest.approx(
        [after - before for before, after in itertools.pairwise(shares)]
    )
    assert plan.prediction_type == "flow_prediction"
    with pytest.raises(AccuQuantError, match="does not fit what this model predicts, a flow"):
        trace("ddim", model.noise_schedule, 7)


def test_the_size_of_medium():
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(2028.33, abs=0.01)


@pytest.mark.parametrize("size", [7, 14])
def test_sizes_that_do_not_fit_are_named(size, saved):
    with pytest.raises(AccuQuantError, match=f"a latent of {size}x{size} is no whole number of patches of 2"):
        saved(f"size: {size}")
