"""verify_on_gpu.py without a GPU: on a stand-in for one its stages see what is right and what is wrong."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.engines import plans
from accuquant.runtime.engines.base import Kernel
from accuquant.runtime.engines.cuda import gpu as real_gpu
from accuquant.runtime.engines.rtx_log import Compiled

TOOLS = Path(__file__).parents[2] / "tools"
NUMBERS = {"n": 2, "batch": "2", "repeats": 8, "samples": 1, "engines": "tensorrt,tensorrt-rtx", "seconds": 600}


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(TOOLS))
    try:
        import gpu_stages
        import verify_on_gpu

        yield gpu_stages, verify_on_gpu
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def bundles(tiny, tools, tmp_path_factory):
    """The tiny U-Net for TensorRT in integers, and in float16 as the tool itself exports it."""
    stages, _ = tools
    folder = tmp_path_factory.mktemp("bundles")
    integer = tiny.export(folder, weight_bits=8, target="tensorrt")
    stages.export(str(folder / "tiny.ckpt"), "fp16", 6, str(folder / "half"))
    return {"int": integer.folder, "half": folder / "half"}


@pytest.fixture
def on_a_gpu(stand_in, tools, bundles, tmp_path, monkeypatch):
    """The command on a stand-in GPU, its stages in this process; every plan is of the graph that it was compiled of."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (pip install 'accuquant[rtx]')")
    stages, verify = tools
    monkeypatch.setenv("ACCUQUANT_CACHE", str(tmp_path / "cache"))
    stand_in.install(monkeypatch, bundles["int"] / "denoiser.onnx").room = 999  # of a graph that shows every layer
    operators = Bundle(bundles["int"]).manifest.operators

    def compiled(request, out=None):
        plan = hashlib.sha256(request.graph.read_bytes()).digest()
        stand_in.Runtime.graphs[plan] = Path(shutil.copy(request.graph, tmp_path / f"{plan.hex()}.onnx"))
        out.write_bytes(plan)
        return Compiled(tuple(Kernel("correlation", "Int8", (name,)) for name in operators), 10, 20)

    def here(stage, request, work, seconds):
        asked, answer = tmp_path / "request.json", tmp_path / "answer.json"
        asked.write_text(json.dumps(request))
        stages.main(stage, str(asked), str(answer))
        return json.loads(answer.read_text())

    monkeypatch.setattr(plans, "compile_plan", compiled)
    monkeypatch.setattr(verify, "in_child", here)

    def run(*given, **changes):
        out = tmp_path / "gpu.json"
        arguments = NUMBERS | {"out": out, "work": tmp_path / "work"} | changes
        code = 0
        try:
            verify.main(list(given), **arguments)
        except verify.typer.Exit as stopped:
            code = stopped.exit_code
        return json.loads(out.read_text()), code

    return run


def outcomes(report, *but):
    return {(a["stage"], a["engine"]): a["outcome"] for a in report["attempts"] if a["stage"] not in but}


@pytest.mark.slow
def test_what_is_right_holds_on_every_engine_and_all_is_in_one_file(on_a_gpu, bundles):
    report, code = on_a_gpu(bundles["half"], bundles["int"])
    stages = ("build", "precision", "numerics", "layers")
    for engine in ("tensorrt", "tensorrt-rtx"):
        assert {o for (s, e), o in outcomes(report, "benchmark").items() if e == engine} == {"held"}
        assert {s for s, e in outcomes(report, "benchmark") if e == engine} == set(stages)
    raced = [a for a in report["attempts"] if a["stage"] == "benchmark"]
    assert [a["engine"] for a in raced] == ["tensorrt", "tensorrt-rtx"]
    for race in raced:
        assert list(race["facts"]["sides"]) == ["FP16", "W8A8"]  # what must be beaten comes first
        (claim,) = race["claims"]
        assert claim == "a step of W8A8 is faster than one of FP16 at batch 2"
        assert race["claims"][claim] == (race["facts"]["sides"]["W8A8"]["step_saved"]["low"] > 0)
    assert report["held"] == all(a["outcome"] == "held" for a in report["attempts"])
    assert code == (0 if report["held"] else 2)
    assert "Stand-in (sm89)" in report["gpu"]["gpu"]
    assert report["machine"]["cpu"]
    numbers = next(a for a in report["attempts"] if a["stage"] == "numerics" and "W8A8" in a["subject"])["facts"]
    steps = len(Bundle(bundles["int"]).plan)
    assert len(numbers["sqnr_db"]["engine"]) == len(numbers["distance"]["engine"]) == steps
    assert numbers["end_sqnr_db"]["engine"] == pytest.approx(-20 * np.log10(numbers["distance"]["engine"][-1]))
    looked_at = [a["facts"]["layers"] for a in report["attempts"] if a["stage"] == "layers"]
    computed = sum(not f.in_table for f in Bundle(bundles["int"]).manifest.operators.values())
    assert looked_at == [0, computed] * 2


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_refuted(on_a_gpu, bundles, stand_in, monkeypatch):
    run = stand_in.IExecutionContext._run

    def wrong(self):
        run(self)
        out = next(p for p in self._addresses if p not in ("x", "t"))
        stand_in.Runtime.gpu.memory[self._addresses[out]].view(np.float32)[:] *= 1.2

    monkeypatch.setattr(stand_in.IExecutionContext, "_run", wrong)
    report, code = on_a_gpu(bundles["int"], engines="tensorrt")
    assert code == 2
    assert not report["held"]
    found = outcomes(report)
    assert found["numerics", "tensorrt"] == "refuted"
    assert found["build", "tensorrt"] == found["precision", "tensorrt"] == "held"
    assert found["benchmark", "tensorrt"] == "skipped"  # there is nothing in float16 to compare with


@pytest.mark.slow
def test_an_engine_whose_results_change_from_run_to_run_is_refuted(on_a_gpu, bundles, stand_in, monkeypatch):
    """As one would whose captured graph reads another buffer than the runs before it."""
    monkeypatch.setattr(stand_in.Cuda, "cudaGraphLaunch", lambda self, graph, stream: self.memory.copy() and (0,))
    forget = stand_in.Cuda.cudaGraphInstantiate

    def cleared(self, graph, flags):
        for block in self.memory.values():
            block[:] = 0
        return forget(self, graph, flags)

    monkeypatch.setattr(stand_in.Cuda, "cudaGraphInstantiate", cleared)
    report, code = on_a_gpu(bundles["int"], engines="tensorrt")
    assert code == 2
    builds = [a for a in report["attempts"] if a["stage"] == "build"]
    assert {a["outcome"] for a in builds} == {"refuted"}


@pytest.mark.slow
def test_kernels_in_float_are_refuted_by_name(on_a_gpu, bundles, monkeypatch):
    operators = Bundle(bundles["int"]).manifest.operators
    one = next(name for name, facts in operators.items() if not facts.in_table)
    made = plans.compile_plan

    def in_float(request, out=None):
        kernels = made(request, out).kernels
        return Compiled(tuple(replace(k, precision="Half") if k.nodes == (one,) else k for k in kernels), 10, 20)

    monkeypatch.setattr(plans, "compile_plan", in_float)
    report, _ = on_a_gpu(bundles["int"], engines="tensorrt-rtx")
    (seen,) = [a for a in report["attempts"] if a["stage"] == "precision"]
    assert seen["outcome"] == "refuted"
    assert [row["operator"] for row in seen["facts"]["others"]] == [one]


@pytest.mark.slow
def test_a_failing_stage_is_told_and_the_rest_goes_on(on_a_gpu, bundles, monkeypatch):
    def full(request, out=None):
        raise RuntimeError("no tactics to implement the operation")

    monkeypatch.setattr(plans, "compile_plan", full)
    report, code = on_a_gpu(bundles["int"], engines="tensorrt")
    assert code == 2
    failed = [a for a in report["attempts"] if a["outcome"] == "failed"]
    assert {a["stage"] for a in failed} == {"build", "precision", "numerics", "layers"}
    assert all("no tactics to implement the operation" in a["failed"] for a in failed)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("import sys; sys.exit('driver mismatch')", "gave no answer (exit code 1): driver mismatch"),
        ("import time; time.sleep(60)", "took longer than 2 s"),
    ],
)
def test_a_stage_that_dies_is_a_failure_with_a_reason(tools, tmp_path, program, said):
    _, verify = tools
    told = verify.answer_of([sys.executable, "-c", program], tmp_path / "answer.json", 2, tmp_path)
    assert told["failed"].startswith(said)
    assert verify.outcome_of(told) == "failed"


@pytest.mark.slow
def test_a_stages_own_process_answers(tools, bundles, tmp_path):
    """The real way: a child, whose refusal arrives as one sentence."""
    _, verify = tools
    told = verify.in_child("precision", {"bundle": str(tmp_path / "none"), "engine": "tensorrt"}, tmp_path, 600)
    assert told == {
        "failed": f"{tmp_path / 'none'} is not a bundle: it has no manifest.json; make one with accuquant-export"
    }


def test_without_a_gpu_nothing_is_claimed(tools, tmp_path, monkeypatch, capsys):
    if real_gpu() is not None:
        pytest.skip("this machine has a GPU")
    _, verify = tools
    out = tmp_path / "gpu.json"
    with pytest.raises(verify.typer.Exit) as stopped:
        verify.main([], out=out, work=tmp_path, **NUMBERS)
    assert stopped.value.exit_code == 3
    report = json.loads(out.read_text())
    assert not report["held"]
    assert "no GPU that CUDA can use" in report["facts"]["why_not"]
    assert "nothing was verified" in capsys.readouterr().out


def test_nothing_claimed_is_not_all_held(tools, tmp_path):
    _, verify = tools
    record = verify.Record(tmp_path / "r.json", {})
    record.add("build", "a", "tensorrt", {"skipped": "8-bit floats"})
    assert not record.held
    record.add("build", "b", "tensorrt", {"claims": {"all is well": True}, "facts": {}})
    assert record.held
    record.add("build", "c", "tensorrt", {"claims": {"all is well": False}, "facts": {}})
    assert not record.held
    assert [a["outcome"] for a in json.loads((tmp_path / "r.json").read_text())["attempts"]] == [
        "skipped", "held", "refuted",
    ]  # fmt: skip


@pytest.mark.slow
def test_what_does_not_fit_the_gpu_is_not_tried(tools, bundles):
    _, verify = tools
    bundle = Bundle(bundles["int"])
    assert verify.unfit(bundle, "Stand-in (sm80)") == ""
    bundle.manifest = bundle.manifest.model_copy(update={"scheme": "FP8"})
    assert verify.unfit(bundle, "Stand-in (sm86)") == "8-bit floats are for sm89 and later"
    assert verify.unfit(bundle, "Stand-in (sm120)") == ""
    bundle.manifest = bundle.manifest.model_copy(update={"target": "cpu"})
    assert "export it with --target tensorrt" in verify.unfit(bundle, "Stand-in (sm120)")
