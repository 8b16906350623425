"""PixArt folders: what diffusers' pipeline computes, from a folder to a bundle that takes rows of a file."""

import shutil
import sys

import numpy as np
import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import build, prepare
from accuquant.runtime import cli_sample
from accuquant.runtime.bundle import Bundle, ByRows
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pipeline import Pipeline
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

SETTINGS = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 24, "caption_channels": 16, "sample_size": 8,
}  # fmt: skip
MASK = torch.tensor([[1.0, 1, 1, 0, 0], [1.0, 1, 1, 1, 1], [1.0, 0, 0, 0, 0]])


def transformer(formula, **changes):
    network = PixArtTransformer2DModel(**{**SETTINGS, **changes}).eval()
    network.load_state_dict(formula.formula_weights(network.state_dict()))
    return network


def rows(formula, path):
    """A file of three texts, of which the last stands for none as well; the pipeline's own dtype for embeddings."""
    context = formula.formula_input((3, 5, 16))
    stored = {"context": context, "mask": MASK, "empty.context": context[2], "empty.mask": MASK[2:]}
    save_file({name: value.to(torch.bfloat16).clone() for name, value in stored.items()}, path)
    return path, context.bfloat16().float()


@pytest.fixture
def saved(formula, tmp_path):
    def make(**changes):
        network = transformer(formula, **changes)
        network.save_pretrained(tmp_path / "pixart")
        path, context = rows(formula, tmp_path / "rows.safetensors")
        return network, load_model(tmp_path / "pixart", None, path), context

    return make


@pytest.mark.parametrize("sized", [False, True])
def test_agrees_with_diffusers_as_its_pipeline_calls_it(sized, saved, formula):
    """Masked texts, the variance cut off; 64 pixels and aspect 1 where the network is told of them."""
    network, model, context = saved(use_additional_conditions=sized)
    x, t = formula.formula_input((2, 4, 8, 8)), torch.tensor([617, 40])
    told = {"resolution": None, "aspect_ratio": None}
    if sized:
        told = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.tensor([[1.0]] * 2)}
    with torch.no_grad():
        made = model.network(x, t.float(), context=context[:2], mask=MASK[:2])
        theirs = network(
            x, encoder_hidden_states=context[:2], encoder_attention_mask=MASK[:2].long(), timestep=t,
            added_cond_kwargs=told, return_dict=False,
        )[0].chunk(2, dim=1)[0]  # fmt: skip
        unmasked = model.network(x, t.float(), context=context[:2], mask=torch.ones(2, 5))
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-4)
    assert (made - unmasked)[0].abs().max() > 1e-3  # or the mask would not be looked at
    assert model.sample_shape == (4, 8, 8)


def test_seeds_have_rows_and_guidance_leads_away_from_the_empty_one(saved, formula):
    _, model, context = saved()
    assert model.conditioning == ByRows(shapes={"context": (5, 16), "mask": (5,)}, empty=True, guidance=4.5)
    torch.testing.assert_close(model.condition([1, 3])["context"], context[[1, 0]])
    x, t, one = formula.formula_input((2, 4, 8, 8)), torch.tensor([617.0, 617.0]), model.condition([0, 1])
    with torch.no_grad():
        wanted, free = model.network(x, t, **one), model.network(x, t, **model.condition([2, 2]))
        torch.testing.assert_close(model.guided(3.0)(x, t, **one), free + 3 * (wanted - free), rtol=1e-4, atol=1e-5)


def test_without_rows_it_says_what_to_give(saved, tmp_path):
    saved()
    with pytest.raises(AccuQuantError, match=r"--conditions that holds context \(n, any, 16\), mask \(n, any\), and"):
        load_model(tmp_path / "pixart")


def test_the_size_of_alpha():
    """605.30 M by diffusers' defaults, which leave out the captions' projection of the published files (4096 wide)."""
    with torch.device("meta"):
        default, published = PixArtTransformer2DModel(), PixArtTransformer2DModel(caption_channels=4096)
    assert sum(p.numel() for p in default.parameters()) / 1e6 == pytest.approx(605.30, abs=0.01)
    assert sum(p.numel() for p in published.parameters()) / 1e6 == pytest.approx(611.35, abs=0.01)


@pytest.fixture(scope="module")
def made(folders, formula, tmp_path_factory):
    """A bundle that was calibrated once, its model, and the file of rows."""
    folder, scheme = tmp_path_factory.mktemp("pixart"), QuantScheme(weight_bits=8, activation_bits=8)
    request = folders.request("pixart", folder, formula, scheme, sampler="ddim", guidance=2.0)
    bundle = build(request, prepare(request), lambda *_: None).bundle
    return bundle, load_model(request.checkpoint, None, request.conditions), request.conditions


def test_the_twin_on_the_engine_is_torch_under_the_same_rows(made):
    """1e-3 as in other tests of whole chains. Rows of one's own, and the bundle's examples where there are none."""
    bundle, model, _ = made
    assert bundle.manifest.conditioning.empty
    run = simulate(model.guided(2.0), bundle.plan, [0, 1], model.sample_shape, model.condition([0, 1]))
    other = {name: value[::-1] for name, value in model.rows.examples.items()}
    with Pipeline(bundle, network="twin", batch=2) as pipeline:
        np.testing.assert_allclose(pipeline.generate([0, 1]), run.states[-1].numpy(), rtol=0, atol=1e-3)
        swapped = pipeline.generate([0, 1, 2], rows=other)
        np.testing.assert_allclose(swapped[1], run.states[-1][1].numpy(), rtol=0, atol=1e-3)
        assert np.abs(swapped[0] - run.states[-1][0].numpy()).max() > 1e-2  # under the third text
        with pytest.raises(AccuQuantError, match="a row of mask has the shape"):
            pipeline.generate([0], rows={"context": other["context"][:1], "mask": other["mask"][:1, :2]})
        with pytest.raises(AccuQuantError, match="rows of mask were given; the network takes context, mask"):
            pipeline.generate([0], rows={"mask": other["mask"][:1]})
        with pytest.raises(AccuQuantError, match=r"\[1, 2\] rows were given"):
            pipeline.generate([0], rows={"context": other["context"][:1], "mask": other["mask"][:2]})
        with pytest.raises(AccuQuantError, match="takes no negative prompt"):
            pipeline.generate([0], unwanted="ugly")


def test_the_command_takes_rows_of_a_file(made, tmp_path, monkeypatch):
    bundle, _, path = made
    for name, arguments in (("own", []), ("given", ["--conditions", str(path)])):
        monkeypatch.setattr(
            sys, "argv", ["x", str(bundle.folder), "-n", "2", *arguments, "--out", str(tmp_path / f"{name}.npy")]
        )
        with pytest.raises(SystemExit) as done:
            cli_sample.main()
        assert done.value.code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "own.npy"), np.load(tmp_path / "given.npy"))


def test_changed_rows_are_found(made, tmp_path):
    shutil.copytree(made[0].folder, tmp_path / "b")
    (tmp_path / "b" / "conditions.safetensors").write_bytes(b"")
    with pytest.raises(AccuQuantError, match=r"conditions\.safetensors is not the file the manifest describes"):
        Bundle(tmp_path / "b")
