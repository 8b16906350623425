"""Sensitivity is what rounding one layer does to the output; the layers it names keep 8 bits, within their share."""

import pytest
import torch
from accuquant.calibrate import sensitivity as module
from accuquant.calibrate.layers import quantization
from accuquant.calibrate.observers import max_weight_scale
from accuquant.calibrate.sensitivity import keep_sensitive, low_bit, sensitivity
from accuquant.calibrate.trajectory import call


def arguments(run):
    return run.network, run.operators, run.plan, run.teacher


def sizes(run):
    return {name: weight.weight.numel() for name, weight in low_bit(run.operators).items()}


def test_shares_are_the_output_errors_of_one_layer_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "SAMPLES", 3)
    run = tiny.prepare()
    found = sensitivity(*arguments(run))
    x = run.teacher.states[2, :3]  # the middle of four steps
    expected = {}
    with torch.no_grad(), quantization(run.operators, active=False):
        wanted = call(run.network, run.plan, 2, x)
        for name, weight in low_bit(run.operators).items():
            scale = max_weight_scale(weight.weight, weight.grid)
            rounded = (weight.weight / scale).round().clamp(-8, 7) * scale
            layer = run.network.get_submodule(name).layer
            own = layer.weight.data
            layer.weight.data = rounded
            expected[name] = float((call(run.network, run.plan, 2, x) - wanted).square().mean())
            layer.weight.data = own
    total = sum(expected.values())
    assert found == pytest.approx({name: error / total for name, error in expected.items()}, rel=1e-4)


def test_shares_sum_to_one_and_the_network_is_left_as_it_was(tiny):
    run = tiny.prepare()
    before = {name: p.clone() for name, p in run.network.named_parameters()}
    told = []
    found = sensitivity(*arguments(run), lambda *at: told.append(at))
    assert sum(found.values()) == pytest.approx(1)
    assert all(torch.equal(p, before[name]) for name, p in run.network.named_parameters())
    assert told[-1][0] == told[-1][1] == len(told)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_the_most_sensitive_for_their_size_are_kept_within_the_share(tiny, share):
    run = tiny.prepare()
    held = sizes(run)
    found = sensitivity(*arguments(run))
    chosen = keep_sensitive(*arguments(run), share)
    assert sum(held[name] for name in chosen) <= share * sum(held.values())
    worth = {name: found[name] / held[name] for name in held}
    others = held.keys() - set(chosen)
    assert all(worth[name] >= worth[other] for name in chosen for other in others)
    for name in held:
        assert run.operators[name].weight_quantizer.grid.bits == (8 if name in chosen else 4)
    assert (len(others) == 0) == (share == 1.0)


def test_what_is_kept_ends_closer(tiny, tmp_path):
    none, some = tiny.prepare(iterations=0), tiny.prepare(iterations=0)
    assert keep_sensitive(*arguments(some), 0.3)
    assert some.start(tmp_path / "some").initial < 0.6 * none.start(tmp_path / "none").initial


def test_without_a_share_or_low_bits_nothing_is_looked_at(tiny, monkeypatch):
    monkeypatch.setattr(module, "sensitivity", None)
    assert keep_sensitive(*arguments(tiny.prepare()), 0.0) == []
    assert keep_sensitive(*arguments(tiny.prepare(weight_bits=8)), 0.5) == []
