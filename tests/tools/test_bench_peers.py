"""Peers beside a bundle: all in one run, torch on the very network, and failures as rows with a reason."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.runtime import cli_bench
from accuquant.runtime.benchmark import sides_of
from accuquant.runtime.engines import rests
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.peers import beside, parse_peer

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        import bench_peers

        yield bench_peers
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def no_installing(tool, monkeypatch):
    """Peers that run in this interpreter: ONNX Runtime's dynamic quantizer as it is, and two that fail.

    Inductor would take longer than all other tests here.
    """
    import yardsticks

    def without_a_compiler(network, **settings):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setattr(yardsticks, "environment", lambda library, folder: sys.executable)
    broken = tool.Candidate("broken", "nncf", {"preset": "none"})
    monkeypatch.setattr(tool, "GROUPS", {"onnxruntime": list(tool.DYNAMIC[:1]), "nncf": [broken]})


def test_one_table_of_ours_and_theirs(tool, no_installing, tiny_bundle, tmp_path, capsys):
    out = tmp_path / "peers.json"
    checkpoint = tiny_bundle.folder.parent / "tiny.ckpt"
    tool.main(
        tiny_bundle.folder, checkpoint=checkpoint, config=None, peers="onnxruntime,nncf", batch="2", repeats=8,
        threads=1, samples=4, environments=tmp_path, out=out,
    )  # fmt: skip
    (found,) = json.loads(out.read_text())["results"]
    rows = found["rows"]
    ours = [side.name for side in sides_of(tiny_bundle, "auto")]
    assert list(rows)[: len(ours)] == ours
    assert len(ours) == 2 * len(rests())
    assert "failed" in rows["broken"]
    for name in (*ours, "ONNX Runtime dynamic, matmuls", "torch eager"):
        row = rows[name]
        assert row["step_seconds"]["n"] == 8
        expected = rows["fp32"]["step_seconds"]["median"] / row["step_seconds"]["median"]
        assert row["step_speedup"] == pytest.approx(expected)
    assert rows["torch.compile"] == {"ours": False, "failed": "no C++ compiler"}
    assert not rows["torch eager"]["ours"]
    said = capsys.readouterr().out
    assert "one step at batch 2, all in turn" in said
    assert "torch eager" in said


def test_torch_runs_the_checkpoints_network(tool, tiny, tmp_path):
    from torch_engine import TorchEngine

    checkpoint = tiny.save_checkpoint(tmp_path, tiny.unet())
    engine = TorchEngine(load_model(checkpoint), EngineOptions(batch=2, threads=1), checkpoint, compiled=False)
    x = np.random.default_rng(0).standard_normal((2, *tiny.SHAPE)).astype(np.float32)
    t = np.array([3, 80], np.float32)
    wanted = tiny.unet()(torch.from_numpy(x), torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(engine.run({"x": x, "t": t}), wanted, atol=1e-5)
    engine.close()


def test_another_checkpoint_is_refused(tool, tiny, tiny_bundle, tmp_path):
    other = tiny.save_checkpoint(tmp_path, tiny.unet(seed=1))
    with pytest.raises(AccuQuantError, match="name that checkpoint, or none"):
        tool.torch_peers(other, None, tiny_bundle)


@pytest.mark.slow
def test_the_benchmark_takes_graphs_to_compare_with(tiny_bundle, monkeypatch, tmp_path, capsys):
    twin = tiny_bundle.graph("twin")
    (tmp_path / "broken.onnx").write_text("no graph")
    out = tmp_path / "bench.json"
    arguments = ["--batch", "1", "--repeats", "8", "--samples", "1", "--threads", "1", "--out", str(out)]
    arguments += ["--compare", f"their twin={twin}@onnxruntime", "--compare", f"broken={tmp_path / 'broken.onnx'}"]
    monkeypatch.setattr(sys, "argv", ["accuquant-bench", str(tiny_bundle.folder), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli_bench.main()
    assert stopped.value.code == 0
    (found,) = json.loads(out.read_text())["peers"]
    assert found["rows"]["their twin"]["engine"].startswith("ONNX Runtime")
    assert "cannot be read" in found["rows"]["broken"]["failed"]
    assert "their twin" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["model.onnx", "=model.onnx", "a=", "a=m.onnx@cuda"])
def test_a_peer_that_is_not_named_is_refused(text):
    with pytest.raises(AccuQuantError, match="write NAME=GRAPH or NAME=GRAPH@ENGINE"):
        parse_peer(text)


def test_a_graph_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(AccuQuantError, match="does not exist"):
        parse_peer(f"a={tmp_path / 'none.onnx'}")


def test_too_few_repeats_are_said_and_no_number_is_made_up(tiny_bundle):
    sides = sides_of(tiny_bundle, "auto")[:1]
    found = beside(tiny_bundle, sides, {}, "auto", EngineOptions(1, 1), 3, lambda *_: None)
    assert found["rows"]["fp32"]["saves"] is None
