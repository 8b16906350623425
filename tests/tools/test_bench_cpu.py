"""Steps on a CPU: everyone in one run, ratios of the fastest rows, and what the networks are called with."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.errors import AccuQuantError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import bench_cpu

    return bench_cpu


@pytest.fixture
def of_classes(tool, class_bundle, monkeypatch, tmp_path):
    """One guided network, under two names for its bits, a peer that hands the float graph on, and one that fails."""
    import yardsticks

    (tmp_path / "copy.py").write_text("import shutil, sys\nshutil.copy(sys.argv[1], sys.argv[3])\n")
    (tmp_path / "fail.py").write_text("raise ValueError('no such operator: Mish')\n")
    libraries = {name: yardsticks.Library(f"{name}.py", ()) for name in ("copy", "fail")}
    monkeypatch.setattr(yardsticks, "PEERS", tmp_path)
    monkeypatch.setattr(yardsticks, "LIBRARIES", libraries)
    monkeypatch.setattr(yardsticks, "environment", lambda library, folder: sys.executable)
    monkeypatch.setattr(tool, "PRESETS", [yardsticks.Candidate(name, name, {}) for name in libraries])
    monkeypatch.setattr(tool, "NETWORKS", {"classes": tool.NETWORKS["dit"]})
    monkeypatch.setattr(tool, "bundle_of", lambda name, bits, folder: Bundle(class_bundle.folder))
    monkeypatch.setattr(tool, "plain_graph", lambda name, folder: class_bundle.graph("twin"))
    monkeypatch.setattr(tool, "BITS", ("8/8",))
    monkeypatch.setattr(tool, "ratios", lambda report: [])  # they want W8A8 and W4A8
    monkeypatch.setattr(tool, "large_product", lambda threads: {"float32": 1e11, "int8": 4e11})


def test_ratios_are_of_one_run_and_a_peer_that_fails_is_a_row_that_says_why(tool, of_classes, class_bundle, tmp_path):
    out = tmp_path / "cpu.json"
    tool.main(
        networks="classes", batch="1,4", repeats=8, threads=1, folder=tmp_path, environments=tmp_path, out=out, note=""
    )
    report = json.loads(out.read_text())
    rows = report["networks"]["classes"]["rows"]
    assert rows["fail"]["failed"] == "fail failed: ValueError: no such operator: Mish"
    assert rows["fp32, OpenVINO"]["sqnr"] > 80  # float against float
    assert rows["copy, fp32 rest"]["sqnr"] == rows["fp32, OpenVINO"]["sqnr"]  # it is the same graph
    scheme = class_bundle.manifest.scheme
    assert 10 < rows[f"AccuQuant {scheme}, fp32 rest"]["sqnr"] < 60
    assert all(row["seconds"][b]["n"] == 8 for row in rows.values() if "failed" not in row for b in ("1", "4"))


def test_the_share_of_the_limit_is_multiplications_by_time(tool):
    import cpu_ratios

    def row(whose, median, sqnr=30.0):
        return {"whose": whose, "sqnr": sqnr, "seconds": {"2": {"median": median}}}

    rows = {
        "fp32, A": row("fp32", 0.4), "fp32, B": row("fp32", 0.3), "bf16, A": row("bf16", 0.15),
        "AccuQuant W8A8, x": row("ours", 0.12, 20.0), "AccuQuant W8A8, y": row("ours", 0.1),
        "AccuQuant W4A8, x": row("ours", 0.11), "P": row("nncf", 0.2, 25.0), "Q": {"whose": "nncf", "failed": "why"},
        "P, our float graph": row("nncf on ours", 0.15, 25.0),
    }  # fmt: skip
    report = {
        "batches": [2], "limit": {"int8": 4e11},
        "networks": {"n": {"multiplications": 5_000_000_000, "rows": rows}},
    }  # fmt: skip
    (found,) = cpu_ratios.ratios(report)
    assert (found.fp, found.ours, found.peer) == ("fp32, B", "AccuQuant W8A8, y", "P")
    assert found.vs_fp == pytest.approx(3.0)
    assert found.vs_bf16 == pytest.approx(1.5)
    assert found.vs_peer == pytest.approx(2.0)
    assert found.vs_peer_on_ours == pytest.approx(1.5)
    assert (found.sqnr, found.peer_sqnr) == (30.0, 25.0)
    assert found.four == pytest.approx(1.1)
    assert found.share == pytest.approx(2 * 5e9 * 2 / 0.1 / 4e11)


def test_multiplications_are_those_of_the_layers(tool, tiny, tiny_bundle):
    from products import multiplications
    from torch import nn

    network, counted = tiny.unet(), 0

    def count(layer, inputs, output):
        nonlocal counted
        counted += output.numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    import torch

    network(torch.zeros(1, *tiny.SHAPE), torch.zeros(1))
    found = multiplications(tiny_bundle.graph("twin"))
    assert counted < found < 1.2 * counted  # besides convolutions: attention's products and the time's projections


def test_calls_of_a_guided_network_hold_its_conditions_and_the_rows_under_none(tool, class_bundle):
    known = class_bundle.manifest.conditioning
    calls = tool.recorded(class_bundle, range(4), 10_000)
    rows = 2 * 4 * len(class_bundle.plan)
    assert {len(value) for value in calls.values()} == {rows}
    assert set(calls) == {"x", "t", *known.names}
    first = calls[known.names[0]][:8]
    assert (first[4:] == first[4]).all()
    assert not (first[:4] == first[4]).all()
    assert sorted(np.unique(calls["t"])) == sorted({np.float32(s.timestep) for s in class_bundle.plan.steps})


def test_what_cannot_be_measured_is_refused(tool):
    with pytest.raises(AccuQuantError, match="--networks sdxl: there is ddpm, dit, small, conditional"):
        tool.main(networks="sdxl")
    with pytest.raises(AccuQuantError, match="--batch 1,5: sizes that divide 64"):
        tool.main(batch="1,5", networks="small")
