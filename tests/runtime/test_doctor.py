"""The doctor tells what is there, what is missing, and what would sample a bundle."""

import importlib
import json
import sys

import pytest
from accuquant.runtime import cli_doctor
from accuquant.runtime.doctor import examine
from accuquant.runtime.engines import ENGINES, choose
from accuquant.runtime.errors import AccuQuantError


def test_engines_of_this_machine_are_found_with_version_and_types():
    found = {f.backend: f for f in examine("avx2 avx512_vnni")}
    for name in ENGINES:
        assert found[name].version
        assert found[name].computes.startswith("int8 (avx512_vnni), float32")
    assert "--target onnxruntime" in found["onnxruntime"].advice


@pytest.mark.parametrize(
    ("instructions", "computes", "advised"),
    [("avx2", "int8 (emulated)", "no int8 dot product"), ("", "int8, ", ""), ("avx_vnni", "int8 (avx_vnni)", "")],
)
def test_a_cpu_without_integer_products_is_told_so(instructions, computes, advised):
    first = examine(instructions)[0]
    assert first.computes.startswith(computes)
    assert advised in first.advice
    assert bool(advised) == bool(first.advice)


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = {f.backend: f for f in examine("avx2")}
    for name in ENGINES:
        assert found[name].version is None
        assert "accuquant[cpu]" in found[name].advice


def test_a_bundle_is_sampled_by_the_engine_it_was_made_for(monkeypatch):
    assert choose("auto", "cpu") == choose("auto", "tensorrt") == "openvino"
    assert choose("auto", "onnxruntime") == "onnxruntime"
    assert choose("openvino", "onnxruntime") == "openvino"
    monkeypatch.setattr("accuquant.runtime.engines.available", lambda: ["openvino"])
    assert choose("auto", "onnxruntime") == "openvino"
    with pytest.raises(AccuQuantError, match="engine onnxruntime is not installed"):
        choose("onnxruntime", "onnxruntime")


def test_the_command_prints_and_writes_what_it_found(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuquant-doctor", str(tiny_bundle.folder), "--out", str(tmp_path / "d.json")])
    with pytest.raises(SystemExit) as done:
        cli_doctor.main()
    assert done.value.code == 0
    assert "for target cpu would be sampled by openvino" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "d.json").read_text())
    assert [b["backend"] for b in report["backends"]][:2] == list(ENGINES)
    assert report["engine"] == "openvino"
