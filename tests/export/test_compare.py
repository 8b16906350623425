"""Comparing an engine with the standard: agreement is seen as such, and a wrong layer is found by name."""

import json
import sys

import numpy as np
import onnx_ir as ir
import pytest
from accuquant.export import cli_compare, compare
from accuquant.export.graph import save_graph
from accuquant.runtime.engines import ENGINES, open_engine

BROKEN = "mid.block_1.conv2"


@pytest.fixture
def broken_engine(monkeypatch, tmp_path):
    """OpenVINO, but one layer's weights are scaled by 1.1 while it reads the graph."""

    def opened(path, options, engine, target):
        model = ir.load(path)
        for node in model.graph:
            if node.name == BROKEN and (dequantize := node.inputs[1].producer()) is not None:  # not the twin's
                scale = dequantize.inputs[1]
                scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.1), name=scale.name)
        save_graph(model, tmp_path / path.name)
        return open_engine(tmp_path / path.name, options, engine, target)

    monkeypatch.setattr(compare, "open_engine", opened)


def run(bundle, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["accuquant-compare", str(bundle.folder), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli_compare.main()
    return stopped.value.code


@pytest.mark.parametrize("engine", list(ENGINES))
def test_engines_compute_what_the_graph_says(tiny_bundle, engine):
    found = compare.compare(tiny_bundle, engine, range(4), 3, lambda *_: None)
    assert found.first(compare.LEAST) is None
    computed = {name for name, facts in tiny_bundle.manifest.operators.items() if not facts.in_table}
    assert found.layers.keys() == computed
    steps = len(tiny_bundle.plan)
    for course in (found.standard, found.engine):
        assert len(course.alone) == len(course.accumulated) == steps
        assert course.accumulated[-1] > course.accumulated[0] > 0
    assert np.mean(found.engine.alone) == pytest.approx(np.mean(found.standard.alone), abs=1.0)


def test_the_layer_that_departs_is_named_and_no_other(tiny_bundle, broken_engine, monkeypatch, capsys, tmp_path):
    assert run(tiny_bundle, monkeypatch, "-n", "2", "--layers", "2", "--out", str(tmp_path / "c.json")) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert f"layer {BROKEN} is the first that departs: 20 dB" in said  # 20 log10(1 / 0.1)
    assert f"1 of {sum(not f.in_table for f in tiny_bundle.manifest.operators.values())} do" in said
    assert json.loads((tmp_path / "c.json").read_text())["first"] == BROKEN


def test_the_command_says_that_all_is_well(tiny_bundle, monkeypatch, capsys):
    assert run(tiny_bundle, monkeypatch, "-n", "2", "--layers", "1") == 0
    said = capsys.readouterr().out
    assert "computes what the graph says" in said
    assert "seeds 0..1" in said
