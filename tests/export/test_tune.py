"""Tuning: what is decided from what was measured, on real engines, and how it is taken again."""

import json
from dataclasses import replace

import pytest
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export import cli
from accuquant.export import tune as tuning_module
from accuquant.export.build import Request, build, load, prepare
from accuquant.export.tune import Race, Workshop, race, tune
from accuquant.export.tuning import GroupDecision, Saving, Tuning
from accuquant.runtime.engines.cuda import gpu
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.inspection import operator_precisions
from accuquant.runtime.interleave import Gain

NOISE = 0.01


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    return Request(
        checkpoint=tiny.save_checkpoint(folder, tiny.unet()),
        out=folder / "bundle",
        scheme=QuantScheme(weight_bits=4, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"] | {"iterations": 6, "checks": 2}),
        steps=4,
        pictures=4,
    )


@pytest.fixture(scope="module")
def shop(asked):
    model, plan, guidance = load(asked)
    return Workshop(model, plan, asked.scheme, batch=4, guidance=guidance)


@pytest.fixture
def measured(monkeypatch):
    """Races whose outcome is told by a function of the layers in float on both sides; and a list of those that were."""
    raced = []

    def tell(saved, whole=None):
        def told(shop, before, after, rounds):
            raced.append((before, after, rounds))
            if whole is not None and rounds == tuning_module.FINAL_ROUNDS:
                return Race(whole, (1.0, 1.0 - whole.median))
            median = NOISE / 2 if before == after else saved(after) - saved(before)
            return Race(Gain(median, median - NOISE / 2, median + NOISE / 2, rounds), (1.0, 1.0 - median))

        monkeypatch.setattr(tuning_module, "race", told)
        return raced

    return tell


def worth(groups, **gains):
    """Every form's gain, summed over those that are wholly in float; `gains` by position."""
    value = {layers: gains.get(f"g{i}", -0.05) for i, layers in enumerate(groups.values())}
    return lambda in_float: sum(v for layers, v in value.items() if layers <= in_float)


def test_layers_that_run_alike_are_one_group_and_those_in_the_table_are_in_none(shop, tiny_bundle):
    groups = shop.groups()
    found = [name for layers in groups.values() for name in layers]
    assert len(found) == len(set(found))
    assert set(found) == {name for name, facts in tiny_bundle.manifest.operators.items() if not facts.in_table}
    assert len(groups) < len(found)
    alike = next(layers for layers in groups.values() if "down.0.block.0.conv2" in layers)
    assert "down.0.block.0.conv1" in alike


def test_only_what_gains_more_than_noise_is_left_in_float(shop, measured):
    groups = shop.groups()
    forms = list(groups)
    measured(worth(groups, g0=0.08, g1=NOISE, g2=0.03))
    found = tune(shop)
    assert found.noise == pytest.approx(NOISE)
    assert {g.form for g in found.groups if g.in_float} == {forms[0], forms[2]}
    assert set(found.in_float) == groups[forms[0]] | groups[forms[2]]
    assert found.whole.median == pytest.approx(0.11)
    assert [g.form for g in found.groups] == forms, "what was measured and not taken is recorded as well"


def test_a_gain_that_another_takes_away_is_not_taken(shop, measured):
    """Two groups whose gain is the same one: the reorder between them, say."""
    groups = shop.groups()
    first, second = list(groups.values())[:2]
    measured(lambda in_float: 0.05 if first <= in_float or second <= in_float else 0.0)
    found = tune(shop)
    assert set(found.in_float) in ({*first}, {*second})


def test_a_tuning_that_is_no_gain_as_a_whole_is_dropped(shop, measured):
    raced = measured(worth(shop.groups(), g0=0.08), whole=Gain(NOISE, 0.0, 2 * NOISE, 100))
    found = tune(shop)
    assert raced[-1][2] == tuning_module.FINAL_ROUNDS
    assert found.in_float == ()
    assert found.told.startswith("dropped: a step takes 1000.00 ms without and 990.00 ms with it")
    assert found.groups[0].saves.median == pytest.approx(0.08)


def test_nothing_to_gain_takes_no_final_race(shop, measured):
    raced = measured(worth(shop.groups()))
    found = tune(shop)
    assert found.in_float == ()
    assert found.whole is None
    assert "none of" in found.told
    assert tuning_module.FINAL_ROUNDS not in {rounds for _, _, rounds in raced}


def test_a_machine_that_is_faster_in_float_throughout_is_told_so(shop, measured):
    measured(lambda in_float: 0.1 * len(in_float))
    with pytest.raises(AccuQuantError, match="faster with every layer in float"):
        tune(shop)


def test_engines_have_in_float_what_was_asked_and_are_timed_in_turn(shop, tmp_path):
    groups = shop.groups()
    layers = next(iter(groups.values()))
    everything = frozenset[str]().union(*groups.values())
    engine = shop.engine(layers, tmp_path)
    got = operator_precisions(engine, everything)
    engine.close()
    kept = engine.kept_in_float.keys()
    assert {name for name, precision in got.items() if precision in ("i8", "u8")} == everything - layers - kept
    raced = race(shop, frozenset(), layers, 8)
    assert raced.gain.n == 8
    assert raced.gain.low <= raced.gain.median <= raced.gain.high
    assert min(raced.seconds) > 0


def record(layers, **changes):
    saves = Saving(median=0.1, low=0.08, high=0.12, n=40)
    values = {
        "target": "cpu", "engine": "OpenVINO", "machine": {"cpu": "a"}, "batch": 8, "noise": 0.01,
        "groups": (GroupDecision(form="conv", layers=layers, saves=saves, in_float=True),),
        "whole": saves, "step_seconds": (0.02, 0.018),
    }  # fmt: skip
    return Tuning(**values | changes)


def tuned(asked, layers, **changes):
    scheme = asked.scheme.model_copy(update={"in_float": layers})
    return replace(asked, scheme=scheme, tuning=record(layers), **changes)


@pytest.mark.slow
def test_a_tuned_bundle_says_why_and_its_decisions_can_be_taken_again(asked, tmp_path):
    """And interrupted it resumes to the same bytes."""
    layers = ("down.0.block.0.conv1", "down.0.block.0.conv2")
    first = tuned(asked, layers, out=tmp_path / "first")
    made = build(first, prepare(first), lambda *_: None)
    assert not set(layers) & made.bundle.manifest.operators.keys()
    assert "2 more operators in float" in json.loads((first.out / "report" / "report.json").read_text())["policy"]
    page = (first.out / "report" / "index.html").read_text()
    assert "Left in float for speed" in page
    assert "a step takes 20.00 ms without and 18.00 ms with it" in page

    again = Tuning.load(first.out)
    assert again == first.tuning

    def stop(stage, done, total, note):
        if stage == "multi-step" and done == 5:
            raise KeyboardInterrupt

    second = tuned(asked, again.in_float, out=tmp_path / "second")
    with pytest.raises(KeyboardInterrupt):
        build(second, prepare(second), stop)
    kept = Tuning.load(second.work / "tuning.json")
    resumed = replace(tuned(asked, kept.in_float, out=tmp_path / "second", resume=True), tuning=kept)
    build(resumed, prepare(resumed), lambda *_: None)
    for name in ("recipe.safetensors", "denoiser.onnx", "twin.onnx", "plan.json"):
        assert (second.out / name).read_bytes() == (first.out / name).read_bytes(), name


def test_the_command_measures_once_resumes_with_that_and_replays_it(asked, tmp_path, monkeypatch):
    layers, measurings = ("down.0.block.0.conv1",), []
    monkeypatch.setattr(cli, "Workshop", lambda *_, **__: None)
    monkeypatch.setattr(cli, "measure_tuning", lambda *_: measurings.append(1) or record(layers))
    fresh = replace(asked, out=tmp_path / "bundle")
    first = cli._tuned(fresh, 8, None)
    assert first.scheme.in_float == layers
    first.tuning.save(first.work / "tuning.json")  # as build does before it calibrates
    resumed = cli._tuned(replace(fresh, resume=True), 8, None)
    replayed = cli._tuned(fresh, None, first.work / "tuning.json")
    assert resumed == replace(first, resume=True)
    assert replayed == first
    assert len(measurings) == 1
    other = replace(fresh, scheme=QuantScheme(weight_bits=8, activation_bits=8, target="onnxruntime"))
    with pytest.raises(AccuQuantError, match="was tuned for target cpu, this is for onnxruntime"):
        cli._tuned(other, None, first.work / "tuning.json")


def test_records_that_are_none_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(AccuQuantError, match="was exported without --tune"):
        Tuning.load(tiny_bundle.folder)
    with pytest.raises(AccuQuantError, match="does not exist"):
        Tuning.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(AccuQuantError, match="holds no tuning"):
        Tuning.load(tmp_path / "other.json")


def test_a_layer_that_the_network_does_not_have_is_refused_by_name(tiny):
    scheme = QuantScheme(weight_bits=8, activation_bits=8, in_float=("down.9.conv",))
    with pytest.raises(AccuQuantError, match=r"layer down\.9\.conv is to stay in float"):
        quantize_operators(tiny.unet(), scheme, tiny.role_of)


def test_for_gpus_it_is_measured_on_one(asked):
    model, plan, _ = load(asked)
    there = Workshop(model, plan, QuantScheme(weight_bits=8, activation_bits=8, target="tensorrt"), batch=2)
    if gpu() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(AccuQuantError, match="no NVIDIA GPU"):
        tune(there)
