"""Checkpoint to bundle: complete or absent, resumable, and the same bytes either way."""

import json
import re
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from accuquant.calibrate.lora import Lora
from accuquant.calibrate.recipe import Recipe
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export import build as build_module
from accuquant.export.build import Request, build, prepare
from accuquant.export.verify import check_parity
from accuquant.runtime.errors import AccuQuantError


@pytest.fixture
def request_for(tiny_checkpoint, tmp_path):
    def make(**changes):
        values = {
            "checkpoint": tiny_checkpoint,
            "out": tmp_path / "bundle",
            "scheme": QuantScheme(weight_bits=4, activation_bits=8),
            "spec": CalibrationSpec(**PRESETS["smoke"] | {"iterations": 6, "checks": 2}),
            "steps": 4,
            "pictures": 4,
        }
        return Request(**values | changes)

    return make


def quiet(*_):
    pass


def test_bundle_holds_what_the_design_says(tiny_bundle):
    names = {p.name for p in tiny_bundle.folder.iterdir()}
    assert names == {
        "manifest.json",
        "plan.json",
        "denoiser.onnx",
        "twin.onnx",
        "recipe.json",
        "recipe.safetensors",
        "report",
    }
    report = json.loads((tiny_bundle.folder / "report" / "report.json").read_text())
    assert report["n"] == 8
    assert len(report["drift"]) == len(tiny_bundle.plan)
    for row in report["layers"]:
        assert row["role"] == "time" or row["runs_as"] in {"i8", "u8"} or "no VNNI" in row["why"]
    assert {row["runs_as"] for row in report["layers"] if row["role"] == "time"} == {"looked up"}
    assert all(row["reference_db"] > 100 and row["engine_db"] > 45 for row in report["layers"])


def test_four_bit_weights_take_four_bits(tiny_bundle):
    facts = tiny_bundle.manifest.operators.values()
    four = [f for f in facts if f.weight_container == "int4"]
    assert four
    assert all(f.stored_bytes == (f.parameters + 1) // 2 for f in four)
    held = sum(f.stored_bytes for f in facts)
    graph = tiny_bundle.weight_bytes("denoiser")
    twin = tiny_bundle.weight_bytes("twin")
    # The graph is its integers, its float norms and biases, and some kilobytes of nodes - and no float weights.
    assert held < graph < twin / 2


def test_frozen_recipe_round_trips(tiny_bundle, tmp_path):
    recipe = Recipe.load(tiny_bundle.folder)
    recipe.save(tmp_path)
    for name in ("recipe.json", "recipe.safetensors"):
        assert (tmp_path / name).read_bytes() == (tiny_bundle.folder / name).read_bytes()


def test_interrupted_build_leaves_no_bundle_and_resumes_to_the_same_bytes(request_for, tmp_path):
    whole = request_for(out=tmp_path / "whole")
    build(whole, prepare(whole), quiet)

    def stop(stage, done, total, note):
        if stage == "multi-step" and done == 5:
            raise KeyboardInterrupt

    cut = request_for(out=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        build(cut, prepare(cut), stop)
    assert not cut.out.exists()
    resumed = request_for(out=tmp_path / "cut", resume=True)
    build(resumed, prepare(resumed), quiet)
    for name in ("recipe.safetensors", "denoiser.onnx", "twin.onnx", "plan.json"):
        assert (cut.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_resume_with_other_options_names_them(request_for, tmp_path):
    def stop(stage, done, total, note):
        if stage == "multi-step" and done == 4:
            raise KeyboardInterrupt

    first = request_for()
    with pytest.raises(KeyboardInterrupt):
        build(first, prepare(first), stop)
    other = request_for(scheme=QuantScheme(weight_bits=8, activation_bits=8), resume=True)
    with pytest.raises(AccuQuantError, match=r"another run \(scheme"):
        build(other, prepare(other), quiet)


def test_failure_during_export_leaves_nothing_that_looks_finished(request_for, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "write_report", full)
    request = request_for()
    said = rf"cannot write {re.escape(str(request.out))}: No space left on device; choose another --out"
    with pytest.raises(AccuQuantError, match=said):
        build(request, prepare(request), quiet)
    assert not request.out.exists()
    assert not list(request.out.parent.glob("*.part"))


def misfit(monkeypatch):
    """A recipe that has no scales for one of the operators."""
    real = build_module.freeze

    def freeze(*arguments):
        recipe = real(*arguments)
        del recipe.codes["mid.block_1.conv1"]
        return recipe

    monkeypatch.setattr(build_module, "freeze", freeze)


def scale_of(value):
    def spoil(monkeypatch):
        real = build_module.calibrate

        def calibrate(network, operators, *arguments, **named):
            found = real(network, operators, *arguments, **named)
            quantizer = operators["mid.block_1.conv1"].input_quantizers[0]
            quantizer.log_scale.data.fill_(value)
            return found

        monkeypatch.setattr(build_module, "calibrate", calibrate)

    return spoil


def dead_channel(monkeypatch):
    """A weight's channel without a scale, as one of zeros would have it."""
    real = build_module.calibrate

    def calibrate(network, operators, *arguments, **named):
        found = real(network, operators, *arguments, **named)
        operators["mid.block_1.conv1"].weight_quantizer.start[3] = 0
        return found

    monkeypatch.setattr(build_module, "calibrate", calibrate)


def lowered(spoil):
    """What `spoil` does to one convolution's node in the lowered graph, which its target then cannot take."""

    def patch(monkeypatch):
        real = build_module.lower

        def lower(*arguments):
            quantized, twin = real(*arguments)
            spoil(next(node for node in quantized.graph if node.name == "mid.block_1.conv1"))
            return quantized, twin

        monkeypatch.setattr(build_module, "lower", lower)

    return patch


def two_scales(node):
    scale = node.inputs[0].producer().inputs[1]
    scale.const_value = ir.tensor(np.full(2, 0.1, np.float32), name=scale.name)


def odd_int4(node):
    codes = node.inputs[1].producer().inputs[0].producer().inputs[0].producer().inputs[0]
    codes.const_value = ir.tensor(np.zeros((3, 3, 1, 1), ml_dtypes.int4), name=codes.name)


CONV, TRY_AGAIN = r"mid\.block_1\.conv1", r".*calibrate again.*\(--in-float mid\.block_1\.conv1\)"


@pytest.mark.parametrize(
    ("spoil", "target", "said"),
    [
        (misfit, "cpu", rf"layer {CONV}: .*has no codes; .*calibrate again"),
        (scale_of(float("nan")), "cpu", rf"layer {CONV}: activation scale \[?nan.*above zero{TRY_AGAIN}"),
        (scale_of(float("inf")), "cpu", rf"layer {CONV}: activation scale \[?inf.*above zero{TRY_AGAIN}"),
        (dead_channel, "cpu", rf"layer {CONV}: weight scale 3 of 64 is 0;.*above zero{TRY_AGAIN}"),
        (lowered(two_scales), "cpu", rf"{CONV}, input 0: its scale is float32 of shape \(2,\).*one float32 scalar"),
        (lowered(odd_int4), "tensorrt", rf"{CONV}, input 1: is an int4 tensor of 9 elements; store odd sizes as int8"),
    ],
    ids=["misfit", "nan", "inf", "dead channel", "unsupported", "odd int4"],
)
def test_what_is_wrong_is_named_with_the_repair_and_no_bundle_is_left(request_for, monkeypatch, spoil, target, said):
    spoil(monkeypatch)
    request = request_for(
        spec=CalibrationSpec(**PRESETS["smoke"] | {"iterations": 0, "trajectories": 2}),
        scheme=QuantScheme(weight_bits=4, activation_bits=8, target=target),
    )
    prepared = prepare(request)
    with pytest.raises(AccuQuantError, match=said):
        build(request, prepared, quiet)
    assert not request.out.exists()
    assert not list(request.out.parent.glob("*.part"))


def test_an_operator_that_no_target_quantizes_is_named_and_can_be_left_in_float(request_for, monkeypatch):
    """Before anything is calibrated; with the option that the message names, the export goes through."""
    real = build_module.load_model

    def load_model(*arguments):
        model = real(*arguments)
        model.network.mid.block_1.conv1 = torch.nn.ConvTranspose2d(64, 64, 3, padding=1)
        return replace(model, network=model.network.requires_grad_(False))

    monkeypatch.setattr(build_module, "load_model", load_model)
    request = request_for(spec=CalibrationSpec(**PRESETS["smoke"] | {"iterations": 0, "trajectories": 2}))
    with pytest.raises(AccuQuantError, match=rf"layer {CONV} is a ConvTranspose2d, .*\(--in-float {CONV}\)"):
        prepare(request)
    assert not request.out.exists()
    patterns = ("mid.block_1.conv1", "mid.block_2.*")
    request = replace(request, scheme=request.scheme.model_copy(update={"in_float": patterns}))
    manifest = build(request, prepare(request), quiet).bundle.manifest
    assert not [name for name in manifest.operators if name.startswith(("mid.block_1.conv1", "mid.block_2."))]
    assert manifest.in_float["mid.block_1.conv1"] == "asked for (--in-float mid.block_1.conv1)"
    assert manifest.in_float["mid.block_2.conv1"] == "asked for (--in-float mid.block_2.*)"
    assert "in float too mid.block_1.conv1 mid.block_2.*" in request.scheme.described


def test_a_folder_with_other_things_is_not_overwritten(request_for, tmp_path):
    request = request_for()
    request.out.mkdir()
    (request.out / "thesis.tex").write_text("precious")
    with pytest.raises(AccuQuantError, match="something else than a bundle"):
        prepare(request)
    assert (request.out / "thesis.tex").read_text() == "precious"


def test_parity_check_catches_a_graph_that_is_not_the_model(request_for, tiny_bundle, tmp_path):
    """Swap two quantized weights' scales in the graph; the check must refuse what the ONNX checker accepts."""
    import onnx
    from accuquant.calibrate.trajectory import simulate
    from onnx import numpy_helper

    request = request_for()
    prepared = prepare(request)
    build(request, prepared, quiet)
    broken = shutil.copy(request.out / "denoiser.onnx", tmp_path / "broken.onnx")
    model = onnx.load(broken)
    for tensor in model.graph.initializer:
        if tensor.name == "down.0.block.0.conv2.weight.scale":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1] * 3, tensor.name))
    onnx.save(model, broken)
    judge = simulate(prepared.model.network, prepared.plan, range(2), prepared.model.sample_shape)
    with pytest.raises(AccuQuantError, match="not what was calibrated"):
        check_parity(
            broken, request.out / "twin.onnx", prepared.model.network, prepared.operators, prepared.plan, judge
        )
    assert np.isfinite(tiny_bundle.manifest.quality["sqnr_graph_db"])


def test_a_bundle_for_onnxruntime_goes_the_whole_way(request_for):
    """Its graph passes its checks, and is sampled by the engine it is made for, in integers."""
    asked = request_for(scheme=QuantScheme(weight_bits=4, activation_bits=8, target="onnxruntime"))
    made = build(asked, prepare(asked), quiet)
    assert made.comparison.engine.startswith("ONNX Runtime")
    assert set(made.comparison.runs_as.values()) <= {"i8", "u8"}
    operators = made.bundle.manifest.operators
    assert made.comparison.runs_as.keys() == {name for name, facts in operators.items() if not facts.in_table}
    assert all(facts.weight_container in ("int4", "int8", "table", "-") for facts in operators.values())
    written = {name for name, facts in made.bundle.manifest.operators.items() if facts.output}
    convolutions = {name for name, facts in made.bundle.manifest.operators.items() if facts.kind == "conv"}
    assert written == convolutions


def test_what_a_teacher_depends_on_is_in_its_key(request_for, tiny_checkpoint, tmp_path):
    """The YAML beside the checkpoint, and LoRAs by content and weight: with another, its trajectories are others."""

    class AskedError(Exception):
        pass

    class Cache:
        def get(self, depends_on, compute):
            raise AskedError(json.dumps(depends_on))

    request = request_for(cache=Cache())
    prepared = prepare(request)

    def key(**changes):
        with pytest.raises(AskedError) as asked:
            build(replace(request, **changes), prepared, quiet)
        return str(asked.value)

    lora, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lora.write_bytes(b"one")
    other.write_bytes(b"another")
    keys = [key(), *(key(loras=(Lora(path, w),)) for path, w in ((lora, 1.0), (lora, 0.5), (other, 1.0)))]
    yaml = tiny_checkpoint.with_suffix(".yml")
    yaml.write_text(yaml.read_text() + "# changed\n")
    keys.append(key())
    assert len(set(keys)) == 5
    other.write_bytes(b"one")
    assert key(loras=(Lora(other, 0.5),)) == key(loras=(Lora(lora, 0.5),))
