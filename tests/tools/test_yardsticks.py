"""The yardsticks: what the peers are calibrated on, how a peer's failure is told, and how kernels are counted."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import JUDGE_SEEDS, TEACHER_SEEDS
from accuquant.runtime.errors import AccuQuantError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def yardsticks():
    sys.path.insert(0, str(TOOLS))
    try:
        import yardsticks

        yield yardsticks
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def peers(yardsticks, monkeypatch, tmp_path):
    """Two peers that run in this interpreter: one hands the float graph on, one fails with its own words."""
    scripts = {
        "copy.py": "import shutil, sys\nshutil.copy(sys.argv[1], sys.argv[3])\n",
        "fail.py": "raise ValueError('no such operator: Mish')\n",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(yardsticks, "PEERS", tmp_path)
    monkeypatch.setattr(
        yardsticks, "LIBRARIES", {"copy": yardsticks.Library("copy.py", ()), "fail": yardsticks.Library("fail.py", ())}
    )
    monkeypatch.setattr(yardsticks, "environment", lambda library, folder: sys.executable)
    made = (
        yardsticks.Candidate("handed on", "copy", {}),
        yardsticks.Candidate("broken", "fail", {"calibration": "max"}),
    )
    monkeypatch.setattr(yardsticks, "CANDIDATES", made)


def test_peers_are_calibrated_on_whole_trajectories_of_seeds_that_nobody_is_judged_on(yardsticks, tiny, tiny_bundle):
    steps, chains = len(tiny_bundle.plan), yardsticks.CHAINS
    seeds = range(TEACHER_SEEDS, TEACHER_SEEDS + chains)
    held = yardsticks.recorded(tiny_bundle, seeds, steps * chains)
    assert not {*seeds} & {*range(1000), *range(JUDGE_SEEDS, JUDGE_SEEDS + 1000)}
    states = simulate(tiny.unet(), tiny_bundle.plan, seeds, tiny.SHAPE).states.numpy()
    for i, step in enumerate(tiny_bundle.plan.steps):
        rows = slice(i * chains, (i + 1) * chains)
        assert (held["t"][rows] == np.float32(step.timestep)).all()
        np.testing.assert_allclose(held["x"][rows], states[i] * step.input_scale, atol=1e-4)
    some = yardsticks.recorded(tiny_bundle, seeds, 7)
    assert some["x"].shape == (7, *tiny.SHAPE)
    assert {float(some["t"][0]), float(some["t"][-1])} == {held["t"][0], held["t"][-1]}  # from end to end


def test_all_are_measured_alike_and_a_peer_that_fails_is_a_row_that_says_why(yardsticks, peers, tiny_bundle, tmp_path):
    out = tmp_path / "yardsticks.json"
    yardsticks.main([tiny_bundle.folder], out=out, peers="copy,fail", environments=tmp_path, samples=4, n=3, repeats=2)
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert list(rows) == ["fp32", "AccuQuant W4A8, cpu", "handed on", "broken"]
    assert rows["broken"]["failed"] == "broken failed: ValueError: no such operator: Mish"
    assert rows["handed on"]["coverage"]["low_bit"] == 0  # it is the float graph
    assert rows["handed on"]["psnr_mean"] == rows["fp32"]["psnr_mean"]
    assert max(rows["handed on"]["drift"]) == 0
    ours = rows["AccuQuant W4A8, cpu"]
    few, kept, every = (ours["coverage"][name] for name in ("low_bit", "kept_in_float", "all"))
    assert every - few - kept == 3  # the network's ends stay in float, and the last one is in two parts
    assert len(ours["drift"]) == len(tiny_bundle.plan)
    assert 0 < ours["drift"][-1] < 1
    assert ours["file_bytes"] < rows["fp32"]["file_bytes"]
    for row in (rows["fp32"], ours, rows["handed on"]):
        assert row["step_seconds"]["8"]["cpu"] > 0
    assert "refused" in ours["compiled"]  # unsigned activations
    assert out.with_suffix(".svg").exists()
    assert {"cpu", "cores"} <= report["machine"].keys()


def test_a_peer_is_given_the_weights_that_lie_beside_a_large_graph(yardsticks, peers, tiny_bundle, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    model, large = onnx.load(tiny_bundle.graph("twin")), tmp_path / "here" / "twin.onnx"
    count = len(model.graph.initializer)
    onnx.save(model, large, save_as_external_data=True, location="twin.onnx.data", size_threshold=0)
    copied = yardsticks.CANDIDATES[0]
    made = yardsticks.quantize(copied, [], large, tmp_path / "none.npz", tmp_path / "there", sys.executable)
    assert len(onnx.load(made).graph.initializer) == count


def test_an_environment_that_cannot_be_made_is_told_in_the_installers_words(yardsticks, monkeypatch, tmp_path):
    library = yardsticks.Library("x.py", ("accuquant-no-such-package==0",))
    monkeypatch.setattr(yardsticks, "LIBRARIES", {"nothing": library})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AccuQuantError, match=r"nothing cannot be installed: .*accuquant-no-such-package"):
        yardsticks.environment("nothing", tmp_path)


def test_unknown_peers_are_refused(yardsticks, tmp_path):
    with pytest.raises(AccuQuantError, match="--peers olive: there is nncf, onnxruntime, modelopt"):
        yardsticks.main([tmp_path], peers="nncf,olive")
