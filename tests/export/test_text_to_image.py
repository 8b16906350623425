"""A latent text-to-image model all the way: text encoder, guided denoiser and decoder as engines of one bundle."""

import shutil
import sys

import numpy as np
import pytest
import torch
from accuquant.calibrate.trajectory import simulate
from accuquant.export import build as building
from accuquant.export import companions
from accuquant.runtime import cli_sample
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.conditions import Prompts, open_conditions
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pictures import to_uint8
from accuquant.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def bundle(text_model, tmp_path_factory):
    """Of an encoder that gives a sequence and a whole."""
    return text_model.export(tmp_path_factory.mktemp("pooled"), pooled=True)


def test_the_bundle_holds_every_network_and_the_tokenizer(bundle):
    assert set(bundle.manifest.networks) == {"denoiser", "twin", "text_encoder", "decoder"}
    assert "tokenizer.json" in bundle.manifest.networks["text_encoder"].files


def test_the_twin_paints_what_torch_paints(bundle, text_model):
    """Latents to 1e-3, as in other tests of whole chains; pixels to one level of 255."""
    toy, prompts = text_model.model(pooled=True), ["blue apple", "red heart", "blue apple"]
    network = toy.guided(3.0)
    condition = dict(zip(("context", "pooled"), toy.text(prompts), strict=True))
    run = simulate(network, bundle.plan, [5, 6, 7], toy.sample_shape, condition)
    with torch.no_grad():
        expected = to_uint8(toy.decoder(run.states[-1]).numpy())
    with Pipeline(bundle, network="twin", batch=2) as pipeline:
        latents = pipeline.generate([5, 6, 7], prompts=prompts)
        np.testing.assert_allclose(latents, run.states[-1].numpy(), rtol=0, atol=1e-3)
        assert np.abs(pipeline.pictures(latents).astype(int) - expected).max() <= 1


def test_a_picture_depends_on_its_seed_and_prompt_alone(bundle):
    with Pipeline(bundle, batch=4) as pipeline:
        alone = pipeline.generate([9], prompts=["blue heart"])
        among = pipeline.generate([1, 9, 9], prompts=["red apple", "blue heart", "red apple"])
    np.testing.assert_array_equal(among[1], alone[0])
    assert np.abs(among[2] - alone[0]).max() > 0.01


def test_a_negative_prompt_takes_the_place_of_none(bundle):
    with Pipeline(bundle, batch=1) as pipeline:
        plain, empty = pipeline.generate([3]), pipeline.generate([3], unwanted="")
        away = pipeline.generate([3], unwanted="blue")
    np.testing.assert_array_equal(plain, empty)
    assert np.abs(away - plain).max() > 0.01
    with Pipeline(bundle, batch=1, guidance=1.0) as pipeline, pytest.raises(AccuQuantError, match="through guidance"):
        pipeline.generate([3], unwanted="blue")


def test_zeros_may_stand_for_none(bundle):
    """But not for the empty text where it is a prompt, nor for what is unwanted."""
    known = bundle.manifest.conditioning.model_copy(update={"zeros_for_none": True})
    zeros, plain = Prompts(bundle, known, "onnxruntime", 1), open_conditions(bundle, "onnxruntime", 1)
    for name, row in zeros.free().items():
        assert row.shape == plain.free()[name].shape
        assert not row.any()
        assert plain.free()[name].any()
        np.testing.assert_array_equal(zeros.free("red")[name], plain.free("red")[name])
        np.testing.assert_array_equal(zeros.rows([""])[name], plain.rows([""])[name])
    zeros.close()
    plain.close()


def test_guidance_and_negative_prompts_of_strangers_in_a_batch_change_no_picture(bundle):
    with Pipeline(bundle, batch=4) as pipeline:
        alone = pipeline.generate([9], prompts=["blue heart"], unwanted="red", guidance=[2.0])
        among = pipeline.generate(
            [1, 9, 9, 9],
            prompts=["red apple", "blue heart", "blue heart", "blue heart"],
            unwanted=["blue", "red", "", "red"],
            guidance=[5.0, 2.0, 2.0, 1.0],
        )
    np.testing.assert_array_equal(among[1], alone[0])
    assert np.abs(among[2] - alone[0]).max() > 1e-3
    assert np.abs(among[3] - alone[0]).max() > 1e-3


def test_an_engine_opened_without_guidance_refuses_it(bundle):
    with Pipeline(bundle, batch=1, guidance=1.0) as pipeline, pytest.raises(AccuQuantError, match="opened for none"):
        pipeline.generate([3], guidance=[2.0])


def test_conditions_of_the_other_kind_are_refused(bundle, tiny_bundle):
    with Pipeline(bundle, batch=1) as pipeline, pytest.raises(AccuQuantError, match="the network takes prompts"):
        pipeline.generate([0], classes=[1])
    with Pipeline(tiny_bundle, batch=1) as pipeline, pytest.raises(AccuQuantError, match="takes no condition"):
        pipeline.generate([0], prompts=["red"])


def test_a_changed_tokenizer_is_found(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    with pytest.raises(AccuQuantError, match=r"tokenizer\.json is not the file the manifest describes"):
        Bundle(tmp_path / "b")


def test_a_decoder_that_exports_wrongly_leaves_no_bundle(text_model, tmp_path, monkeypatch):
    wrong = text_model.request(tmp_path)
    traced = companions._trace

    def off(network, name, example, outputs):
        graph = traced(network, name, example, outputs)
        for value in graph.graph.initializers.values():
            if value.const_value is not None and value.const_value.shape.rank() == 4:
                value.const_value = companions.ir.tensor(value.const_value.numpy() * 1.1)
        return graph

    monkeypatch.setattr(building, "load_model", text_model.model)
    monkeypatch.setattr(companions, "_trace", off)
    with pytest.raises(AccuQuantError, match="the exported decoder differs from the model"):
        building.build(wrong, building.prepare(wrong), lambda *_: None)
    assert not wrong.out.exists()


def test_the_command_paints_prompts(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv",
        ["accuquant-sample", str(bundle.folder), "-n", "2", "--prompt", "red apple", "--prompt", "blue heart",
         "--negative-prompt", "red", "--guidance", "4", "--out", str(tmp_path / "folder")],
    )  # fmt: skip
    with pytest.raises(SystemExit) as done:
        cli_sample.main()
    assert done.value.code == 0
    assert len(list((tmp_path / "folder").glob("*.png"))) == 2
