"""`accuquant-verify`: what holds is said, what does not is one sentence and exit code 1."""

import json
import re
import shutil
import sys
from contextlib import suppress

import onnx
import pytest
from accuquant.runtime import cli_verify, trial
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import sha256
from accuquant.runtime.onnx_files import external_files
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def copied(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")


@pytest.fixture
def verify(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["accuquant-verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli_verify.main()
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return done.value.code, " ".join((told.out + told.err).split())

    return run


def test_a_bundle_as_exported_holds(verify, tiny_bundle):
    code, said = verify(tiny_bundle.folder)
    assert code == 0
    assert f"{len(tiny_bundle.digests)} as described" in said
    assert "6 network calls; its graphs know these timesteps only" in said
    assert "denoiser runs on" in said
    assert "twin runs on" in said
    assert "pictures are 8x8" in said
    assert "not described" not in said


def test_strangers_in_the_folder_are_named(verify, copied):
    (copied / "report" / "notes.txt").write_text("mine")
    code, said = verify(copied, "--no-load")
    assert code == 0
    assert "not described, and never read: report/notes.txt" in said


@pytest.mark.parametrize("name", ["denoiser.onnx", "twin.onnx", "plan.json", "recipe.safetensors", "report/index.html"])
def test_any_file_cut_off_is_found(verify, copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-1])
    code, said = verify(copied)
    assert code == 1
    assert f"{path.name} is not the file the manifest describes" in said


def described(folder, network="twin"):
    """Let the manifest describe what was put into the graph, as someone with bad intentions would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["networks"][network]["files"]
    files[f"{network}.onnx"] = sha256(folder / f"{network}.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_external(path, location, where):
    """The graph at `path` with a tensor that lies elsewhere: an initializer, or a constant in a branch of a branch."""
    model = onnx.load(path, load_external_data=False)
    tensor = onnx.TensorProto(name="elsewhere", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="4")
    if where == "initializer":
        model.graph.initializer.append(tensor)
    else:
        inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
        node = onnx.helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=inner)
        model.graph.node.append(node)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("where", ["initializer", "branch"])
@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "recipe.safetensors"])
def test_a_graph_that_reads_other_files_is_refused(verify, copied, location, where):
    with_external(copied / "twin.onnx", location, where)
    described(copied)
    code, said = verify(copied)
    assert code == 1
    assert f"twin.onnx reads '{location}'" in said


def test_external_data_that_the_manifest_names_is_welcome(copied):
    with_external(copied / "twin.onnx", "twin.onnx.data", "initializer")
    (copied / "twin.onnx.data").write_bytes(bytes(4))
    described(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["networks"]["twin"]["files"]["twin.onnx.data"] = sha256(copied / "twin.onnx.data")
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert "twin.onnx.data" in Bundle(copied).digests


def test_what_is_no_graph_is_refused_in_a_sentence(verify, copied):
    (copied / "twin.onnx").write_bytes(b"\x3a\xff\xff\x03no graph")
    described(copied)
    code, said = verify(copied)
    assert code == 1
    assert "twin.onnx is not an ONNX graph" in said


@pytest.mark.parametrize("version", [2**62, -1, 1001])
def test_operators_of_a_version_that_nobody_has_are_refused_before_an_engine_counts_up_to_it(verify, copied, version):
    graph = onnx.load(copied / "twin.onnx")
    graph.opset_import[0].version = version
    onnx.save(graph, copied / "twin.onnx")
    described(copied)
    code, said = verify(copied)
    assert code == 1
    assert f"operators of version {version % 2**64}" in said


def test_a_manifest_without_the_plans_digest_is_refused(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"]["plan.json"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AccuQuantError, match=r"does not describe plan\.json"):
        Bundle(copied)


@given(st.binary(max_size=200))
def test_any_bytes_are_walked_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    with suppress(AccuQuantError):
        assert isinstance(external_files(path), set)


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("kill -SEGV $$", r"crashes the engine \(Segmentation fault\); it is damaged, or was made to do that"),
        ("kill -KILL $$", r"crashes the engine \(Killed\)"),
        ("exec sleep 60", "keeps the engine busy for more than 1 s"),
        ("echo no such library >&2; exit 1", "could not be tried: no such library"),
    ],
)
def test_a_library_that_dies_or_hangs_is_told_in_a_sentence(verify, tiny_bundle, tmp_path, monkeypatch, does, words):
    engine = tmp_path / "python"
    engine.write_text(f"#!/bin/sh\n{does}\n")
    engine.chmod(0o755)
    monkeypatch.setattr(trial, "PATIENCE", 1.0)
    monkeypatch.setattr(trial.sys, "executable", str(engine))
    code, said = verify(tiny_bundle.folder)
    assert code == 1
    assert re.search(f"denoiser.onnx {words}", said), said
