"""Model repositories for Triton: what they say, what their model does in a stand-in server, and in a real one."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime import Bundle, Pipeline, cli_serve
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.serve.pbtxt import Word, render
from accuquant.runtime.serve.triton import Serving, write_repository
from hypothesis import given
from hypothesis import strategies as st

BATCH = 4
REAL = "ACCUQUANT_TRITON"  # Python of an environment that has a server


def parse(text):
    """A text-form message as a mapping of lists; words and strings are told apart by their quotes."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[{}:]|[^\s{}:"]+', text)

    def message():
        found = {}
        while tokens and tokens[0] != "}":
            name, opening = tokens.pop(0), tokens.pop(0)
            if opening == "{":
                value = message()
                assert tokens.pop(0) == "}"
            else:
                value = tokens.pop(0)
                value = value if re.match("[A-Z]", value) else json.loads(value)
            found.setdefault(name, []).append(value)
        return found

    whole = message()
    assert not tokens
    return whole


@given(st.text(), st.integers(), st.booleans())
def test_what_is_written_is_read_back(text, number, flag):
    written = render({"a": text, "b": [{"key": text, "value": {"c": number}}, {}], "d": [flag, Word("KIND_CPU")]})
    assert parse(written) == {
        "a": [text], "b": [{"key": [text], "value": [{"c": [number]}]}, {}], "d": [flag, "KIND_CPU"],
    }  # fmt: skip


def written(bundle, folder, **settings):
    versions = write_repository(bundle, folder, Serving("m", BATCH, **settings))
    return {v.parent.name: parse((v.parent / "config.pbtxt").read_text()) for v in versions}


def inputs(config):
    return {i["name"][0]: (i["data_type"][0], i["dims"], i.get("optional", [False])[0]) for i in config["input"]}


def test_configurations_say_what_can_be_asked(tiny_bundle, class_bundle, text_bundle, tmp_path):
    plain = written(tiny_bundle, tmp_path / "plain", instances=2, delay=0.05, queue=9, deadline=2.5)["m"]
    assert inputs(plain) == {"seed": ("TYPE_UINT64", [1], False), "steps": ("TYPE_INT32", [1], True)}
    assert plain["output"][0]["dims"] == [8, 8, 1]
    assert plain["max_batch_size"] == [BATCH]
    assert plain["instance_group"] == [{"count": [2], "kind": ["KIND_CPU"]}]
    batching = plain["dynamic_batching"][0]
    assert batching["max_queue_delay_microseconds"] == [50_000]
    assert batching["default_queue_policy"][0]["max_queue_size"] == [9]
    assert batching["default_queue_policy"][0]["default_timeout_microseconds"] == [2_500_000]
    assert plain["version_policy"] == [{"latest": [{"num_versions": [1]}]}]
    assert plain["model_warmup"][0]["inputs"][0]["key"] == ["seed"]
    of_classes = written(class_bundle, tmp_path / "classes")["m"]
    assert inputs(of_classes).keys() == {"seed", "steps", "class", "guidance"}
    assert inputs(written(class_bundle, tmp_path / "free", guidance=1.0)["m"]).keys() == {"seed", "steps", "class"}
    of_text = written(text_bundle, tmp_path / "text")["m"]
    assert inputs(of_text)["negative_prompt"] == ("TYPE_STRING", [1], True)
    assert of_text["output"][0]["dims"] == [16, 16, 3]


def test_the_denoiser_alone_for_loops_of_ones_own(text_bundle, tmp_path):
    config = written(text_bundle, tmp_path, denoiser=True, threads=3)["m-denoiser"]
    assert config["backend"] == ["onnxruntime"]
    assert config["parameters"] == [{"key": ["intra_op_thread_count"], "value": [{"string_value": ["3"]}]}]
    # A timestep has a batch and nothing else, for which Triton wants one dimension more.
    assert config["input"][1] == {"name": ["t"], "data_type": ["TYPE_FP32"], "dims": [1], "reshape": [{}]}
    assert inputs(config)["context"] == ("TYPE_FP32", [4, 8], False)
    graph = tmp_path / "m-denoiser" / "1" / config["default_model_filename"][0]
    assert graph.read_bytes() == text_bundle.graph("denoiser").read_bytes()


def test_plans_of_several_compute_capabilities(tiny_bundle, tmp_path):
    for capability in ("8.9", "12.0"):
        (tmp_path / capability).write_bytes(capability.encode())
    plans = {capability: tmp_path / capability for capability in ("8.9", "12.0")}
    config = written(tiny_bundle, tmp_path / "repository", plans=plans)["m-denoiser"]
    named = {entry["key"][0]: entry["value"][0] for entry in config["cc_model_filenames"]}
    assert config["backend"] == ["tensorrt"]
    assert config["instance_group"][0]["kind"] == ["KIND_GPU"]
    for capability, file in named.items():
        assert (tmp_path / "repository" / "m-denoiser" / "1" / file).read_bytes() == capability.encode()
    with pytest.raises(AccuQuantError, match="does not exist; write --plan"):
        written(tiny_bundle, tmp_path, plans={"8.6": tmp_path / "none"})


def test_writing_again_adds_a_version_and_touches_nothing_else(tiny_bundle, tmp_path):
    written(tiny_bundle, tmp_path)
    before = (tmp_path / "m" / "config.pbtxt").stat()
    written(tiny_bundle, tmp_path)
    assert (tmp_path / "m" / "config.pbtxt").stat() == before
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["1", "2", "config.pbtxt"]
    assert Bundle(tmp_path / "m" / "2" / "bundle").manifest == tiny_bundle.manifest


@pytest.fixture
def backend(monkeypatch):
    """The stand-in for what the server's Python has."""
    spec = importlib.util.spec_from_file_location("stand_in_triton", Path(__file__).parents[2] / "stand_in_triton.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delitem(sys.modules, "accuquant.runtime.serve.triton_model", raising=False)
    return module


@pytest.fixture
def loaded(backend, tmp_path):
    """Writes a bundle's repository and loads a model of it as Triton does, from its model.py."""
    models = []

    def load(bundle, **settings):
        versions = write_repository(bundle, tmp_path / "repository", Serving("m", BATCH, threads=1, **settings))
        spec = importlib.util.spec_from_file_location("model", versions[-1] / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = parse((versions[-1].parent / "config.pbtxt").read_text())
        parameters = {p["key"][0]: {"string_value": p["value"][0]["string_value"][0]} for p in config["parameters"]}
        model = module.TritonPythonModel()
        model.initialize({
            "model_config": json.dumps({"max_batch_size": config["max_batch_size"][0], "parameters": parameters}),
            "model_repository": str(versions[-1].parent), "model_version": "1",
            "model_instance_kind": "CPU", "model_instance_device_id": "0",
        })  # fmt: skip
        models.append(model)
        return model

    yield load
    for model in models:
        model.finalize()


def alone(bundle, seeds, **wishes):
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        return pipeline.pictures(pipeline.generate(seeds, **wishes))


def test_requests_of_strangers_are_one_batch_and_get_their_own_pictures(loaded, backend, text_bundle, monkeypatch):
    model, calls = loaded(text_bundle), []
    generate = Pipeline.generate
    monkeypatch.setattr(Pipeline, "generate", lambda *a, **named: calls.append(named) or generate(*a, **named))
    requests = [
        backend.Request(seed=[7]),
        backend.Request(seed=[2**64 - 1, 3], prompt=[b"red apple", b"blue heart"], guidance=[2.0, 1.0]),
        backend.Request(seed=[7], prompt=[b"red heart"], negative_prompt=[b"blue"]),
    ]
    first, second, third = (response.outputs["picture"] for response in model.execute(requests))
    assert len(calls) == 1
    np.testing.assert_array_equal(first, alone(text_bundle, [7]))
    np.testing.assert_array_equal(
        second, alone(text_bundle, [2**64 - 1, 3], prompts=["red apple", "blue heart"], guidance=[2.0, 1.0])
    )
    np.testing.assert_array_equal(third, alone(text_bundle, [7], prompts=["red heart"], unwanted="blue"))
    assert first.dtype == np.uint8


def test_one_that_cannot_be_fulfilled_fails_alone(loaded, backend, class_bundle):
    requests = [backend.Request(seed=[1], **{"class": [c]}) for c in (0, 99, 2)]
    answers = loaded(class_bundle).execute(requests)
    assert answers[1].error.code == "invalid"
    assert "class 99 is out of range; the network knows 0 to 3" in answers[1].error.message
    for k, c in ((0, 0), (2, 2)):
        np.testing.assert_array_equal(answers[k].outputs["picture"], alone(class_bundle, [1], classes=[c]))


def test_other_steps_than_the_bundles_are_refused_in_words(loaded, backend, tiny_bundle):
    steps = len(tiny_bundle.plan)
    right, wrong = loaded(tiny_bundle).execute([backend.Request(seed=[1], steps=[n]) for n in (steps, steps + 1)])
    np.testing.assert_array_equal(right.outputs["picture"], alone(tiny_bundle, [1]))
    assert wrong.error.code == "invalid"
    assert f"{steps + 1} steps; the bundle was calibrated for {steps}" in wrong.error.message


def test_what_lacks_a_seed_or_says_too_much_is_refused_in_words_and_no_neighbour_is(loaded, backend, text_bundle):
    requests = [
        backend.Request(prompt=[b"red apple"]),
        backend.Request(seed=[1], prompt=[b"red " * 1001]),
        backend.Request(seed=[1], prompt=[b"red apple"]),
    ]
    seedless, long, right = loaded(text_bundle).execute(requests)
    assert (seedless.error.code, long.error.code) == ("invalid", "invalid")
    assert "the request has no seed; send one for every picture" in seedless.error.message
    assert "prompt has 4004 characters; at most 4000" in long.error.message
    np.testing.assert_array_equal(right.outputs["picture"], alone(text_bundle, [1], prompts=["red apple"]))


@pytest.mark.parametrize("previews", [0, 2])
def test_an_engine_that_fails_for_one_fails_for_no_other(loaded, backend, tiny_bundle, monkeypatch, previews):
    """And what it said of this machine stays in the log."""
    generate = Pipeline.generate

    def fragile(self, seeds, **named):
        if 666 in seeds:
            raise RuntimeError("/home/somebody/model.onnx")
        return generate(self, seeds, **named)

    monkeypatch.setattr(Pipeline, "generate", fragile)
    requests = [backend.Request(seed=[seed]) for seed in (1, 666, 2)]
    answers = loaded(tiny_bundle, previews=previews).execute(requests) or [request.sent[-1] for request in requests]
    assert answers[1].error.code == "internal"
    assert "somebody" not in answers[1].error.message
    assert "somebody" in backend.Logger.errors[-1]
    for k, seed in ((0, 1), (2, 2)):
        np.testing.assert_array_equal(answers[k].outputs["picture"], alone(tiny_bundle, [seed]))
    assert not previews or all(request.ended for request in requests)


def test_previews_come_every_few_steps_and_the_picture_last(loaded, backend, tiny_bundle):
    model = loaded(tiny_bundle, previews=2)
    requests = [backend.Request(seed=[4]), backend.Request(seed=[5, 6])]
    assert model.execute(requests) is None
    for request, seeds in zip(requests, ([4], [5, 6]), strict=True):
        assert request.ended
        steps = [response.outputs["step"].ravel().tolist() for response in request.sent]
        assert steps == [[step] * len(seeds) for step in (2, 4, 6)]
        np.testing.assert_array_equal(request.sent[-1].outputs["picture"], alone(tiny_bundle, seeds))
    with pytest.raises(AssertionError):  # a preview is not the picture
        np.testing.assert_array_equal(requests[0].sent[0].outputs["picture"], alone(tiny_bundle, [4]))


def test_a_batch_that_nobody_waits_for_is_given_up(loaded, backend, tiny_bundle, monkeypatch):
    model = loaded(tiny_bundle)
    kept = model.execute([backend.Request(seed=[4], cancelled=True), backend.Request(seed=[5])])
    np.testing.assert_array_equal(kept[1].outputs["picture"], alone(tiny_bundle, [5]))
    (given_up,) = model.execute([backend.Request(seed=[4], cancelled=True)])
    assert given_up.error.code == "cancelled"


def test_the_command_writes_a_repository_and_refuses_wrong_plans(tiny_bundle, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["accuquant-serve", "triton", str(tiny_bundle.folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli_serve.main()
        return done.value.code, " ".join("".join(capsys.readouterr()).split())

    code, said = run("--out", tmp_path / "r", "--name", "toy", "--batch", 2, "--previews", 3, "--denoiser")
    assert code == 0
    assert "tritonserver --model-repository" in said
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["toy", "toy-denoiser", "toy-previews"]
    for wrong in ("8.9", "sm89=x"):
        code, said = run("--out", tmp_path / "r", "--plan", wrong)
        assert code == 1
        assert "--plan 8.9=FILE" in said


@pytest.mark.skipif(
    REAL not in os.environ, reason=f"{REAL} names no Python that has nvidia-pytriton; see real_triton.py"
)
def test_a_real_server(tiny_bundle, class_bundle, text_bundle, tmp_path):
    script = Path(__file__).with_name("real_triton.py")
    bundles = [str(bundle.folder) for bundle in (tiny_bundle, class_bundle, text_bundle)]
    done = subprocess.run(
        [os.environ[REAL], script, tmp_path, *bundles], capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["over_both"] == [True, True, True]  # HTTP, gRPC, plain JSON
    strangers = found["strangers"]
    assert strangers["same"] == strangers["requests"] == strangers["distinct"]
    assert strangers["executions"] < strangers["requests"]  # some were merged
    assert found["bad_one"]["same"]
    assert "class 99 is out of range" in found["bad_one"]["refused"]
    previews = found["previews"]
    assert previews == {"steps": [2, 4, 6], "same": True, "http_steps": [2, 4, 6], "http_same": True}
    assert found["reload"]["lost"] == []
    assert len(found["reload"]["versions"]) > 1
