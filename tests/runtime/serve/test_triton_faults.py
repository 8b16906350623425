"""Faults of a real Triton: one that is killed, and requests that are malformed or too large."""

import http.client
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from accuquant.runtime import Bundle
from accuquant.runtime.serve.triton import Serving, write_repository

REAL = "ACCUQUANT_TRITON"  # Python of an environment that has a server
STEPS = 5_000  # of a picture, so that it takes a while

pytestmark = pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no Python that has nvidia-pytriton")


@pytest.fixture(scope="module")
def started():
    """Of tools/triton_server.py."""
    tools = str(Path(__file__).parents[3] / "tools")
    sys.path.insert(0, tools)
    try:
        from triton_server import started

        yield lambda *arguments, **named: started(os.environ[REAL], *arguments, **named)
    finally:
        sys.path.remove(tools)


@pytest.fixture(scope="module")
def triton(started, class_bundle, text_bundle, tmp_path_factory):
    """A server of both bundles, each of them with previews."""
    folder = tmp_path_factory.mktemp("triton")
    for name, bundle in {"classes": class_bundle, "text": text_bundle}.items():
        write_repository(bundle, folder / "repository", Serving(name, 4, threads=1, previews=2))
    server = started(folder, folder / "repository")
    yield server
    server.stop()


def tensor(name, kind, *values, shape=None):
    return {"name": name, "datatype": kind, "shape": shape or [len(values), 1], "data": list(values)}


SEED = tensor("seed", "UINT64", 4)


def ask(address, model, *tensors, raw=None, headers=None, verb="infer"):
    """(status, JSON) of a request for what the tensors say, or for raw bytes; (status, text) of a stream."""
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"inputs": tensors}).encode() if raw is None else raw
    connection.request("POST", f"/v2/models/{model}/{verb}", body, headers or {})
    answer = connection.getresponse()
    text = answer.read().decode()
    return answer.status, text if verb == "generate_stream" else json.loads(text)


def picture(address, model, *tensors):
    status, body = ask(address, model, *tensors)
    assert status == 200, body
    return body["outputs"][0]["data"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "missing required input(s) ['seed']"),
        ([tensor("class", "INT64", 1)], "the request has no seed; send one for every picture"),
        ([SEED, tensor("klass", "INT64", 1)], "unexpected inference input 'klass'"),
        ([tensor("seed", "FP32", 4)], "expects 'UINT64'"),
        ([tensor("seed", "UINT64", "a")], "non-unsigned-integer"),
        ([tensor("seed", "UINT64", -1)], "non-unsigned-integer"),
        ([tensor("seed", "UINT64", 2**64)], "non-unsigned-integer"),
        ([tensor("seed", "UINT64", 4, shape=[1])], "Expected [-1,1], got [1]"),
        ([tensor("seed", "UINT64", 4, shape=[4, 1])], "Shape does not match"),
        ([tensor("seed", "UINT64", 1, 2, 3, 4, 5)], "batch-size must be <= 4"),
        ([tensor("seed", "UINT64", 4, 5), tensor("class", "INT64", 1)], "batch size does not match"),
        ([SEED, tensor("class", "INT64", -1)], "class -1 is out of range; the network knows 0 to 3"),
        ([SEED, tensor("guidance", "FP32", float("nan"))], "guidance nan is out of range"),
        ([SEED, tensor("steps", "INT32", 7)], "7 steps; the bundle was calibrated for"),
    ],
)
def test_malformed_requests_are_refused_in_words(triton, tensors, words):
    before = picture(triton.http, "classes", SEED)
    status, body = ask(triton.http, "classes", *tensors)
    assert status in (400, 500)  # Triton's own for what its JSON reader does not take
    assert words in body["error"]
    assert picture(triton.http, "classes", SEED) == before


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 60_000], ids=lambda raw: repr(raw[:3]))
def test_bodies_that_are_no_requests_are_refused_in_words(triton, raw):
    status, body = ask(triton.http, "classes", raw=raw)
    assert status == 500
    assert "arse" in body["error"]


@pytest.mark.parametrize(
    ("said", "content", "words"),
    [
        (7, b"\3\0\0\0\xff\xfe\xfd", "prompt is not UTF-8 text"),
        (7, b"\xff\xff\xff\x7fabc", "expecting string of length 2147483647 but only 3 bytes available"),
        (7000, b"\3\0\0\0abc", "unexpected size for input 'prompt'"),
        (4 + 5_000_000, (5_000_000).to_bytes(4, "little") + b"a" * 5_000_000, "prompt has 5000000 characters; at most"),
    ],
    ids=["no text", "a string beyond its end", "a tensor beyond its end", "5 MB"],
)
def test_prompts_that_lie_or_say_too_much_are_refused_in_words(triton, said, content, words):
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": said}}
    head = json.dumps({"inputs": [SEED, prompt]}).encode()
    begun = time.monotonic()
    status, body = ask(triton.http, "text", raw=head + content, headers={"Inference-Header-Content-Length": len(head)})
    assert status == 400
    assert words in body["error"]
    assert time.monotonic() - begun < 5
    assert picture(triton.http, "text", SEED)


def test_streams_refuse_in_words_too(triton):
    status, text = ask(triton.http, "classes-previews", raw=b'{"seed": 5, "class": 99}', verb="generate_stream")
    assert status == 400
    assert "class 99 is out of range" in text


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def waiting(server):
    """Requests that wait for the one that is being painted."""
    connection = http.client.HTTPConnection(server.http.split(":")[0], server.ports[2], timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return 'nv_inference_pending_request_count{model="slow",version="1"} 1' in text


def running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_killed_server_is_heard_of_and_the_next_one_paints_the_same(started, handmade, tmp_path):
    handmade.seed_bundle(tmp_path / "slow", STEPS)
    write_repository(Bundle(tmp_path / "slow"), tmp_path / "repository", Serving("slow", 1, threads=1, previews=100))
    server = started(tmp_path, tmp_path / "repository")
    models = psutil.Process(server.process.pid).children(recursive=True)
    regions = [Path("/dev/shm", model.cmdline()[2]) for model in models]  # Triton's own, which it leaves behind
    with ThreadPoolExecutor(2) as crowd:
        first = picture(server.http, "slow", SEED)
        asked = [crowd.submit(picture, server.http, "slow", SEED) for _ in range(2)]
        until(lambda: waiting(server))
        stream = http.client.HTTPConnection(server.http, timeout=60)
        stream.request("POST", "/v2/models/slow-previews/generate_stream", b'{"seed": 4}')
        previews = stream.getresponse()  # with the first of them
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        for one in asked:  # the one that was painted, and the one that waited
            with pytest.raises(OSError, match=r"(?i)remote end closed|reset"):
                one.result(30)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            previews.read()
    until(lambda: not any(running(model) for model in models))  # with all their memory
    for region in regions:
        region.unlink(missing_ok=True)
    server = started(tmp_path, tmp_path / "repository", ports=server.ports)
    try:
        assert picture(server.http, "slow", SEED) == first
    finally:
        server.stop()
