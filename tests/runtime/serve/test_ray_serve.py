"""Behind Ray Serve: any replica paints the same pictures, more of them come under load, dead ones are replaced."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from accuquant.runtime import Pipeline
from accuquant.runtime.errors import AccuQuantError
from PIL import Image

ray = pytest.importorskip("ray", reason="Ray is not installed; it comes with accuquant[ray]")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed; it comes with accuquant[ray]")
psutil = pytest.importorskip("psutil")
from accuquant.runtime.serve import ray_serve  # noqa: E402
from accuquant.runtime.serve.server import Limits  # noqa: E402

BATCH, WAITING = 2, 6


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tiny_bundle):
    """One to two replicas with short queues, on four cores that Ray is told of."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    port = free_port()
    limits = Limits(waiting=WAITING)
    ray_serve.start(ray_serve.Serving([tiny_bundle.folder], 1, 2, batch=BATCH, limits=limits), "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    ray_serve.stop()


def ask(address, path="/v1/images/generations", **body):
    """Status and answer."""
    data = json.dumps({"prompt": ""} | body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read()
        return error.code, json.loads(said) if said.startswith(b"{") else said.decode()


def pixels(answer):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(d["b64_json"])))) for d in answer["data"]]


def replicas():
    deployments = serve.status().applications[ray_serve.NAME].deployments
    return deployments[ray_serve.NAME].replica_states.get("RUNNING", 0)


def processes():
    return {p.pid for p in psutil.process_iter() if p.name().startswith("ray::ServeRepl")}


def test_strangers_get_the_pictures_that_are_made_without_ray(address, tiny_bundle):
    with Pipeline(tiny_bundle, batch=BATCH, threads=1) as pipeline:
        expected = pipeline.pictures(pipeline.generate(range(6)))[..., 0]
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda seed: ask(address, seed=seed), range(6)))
    assert [status for status, _ in answers] == [200] * 6
    for (_, answer), picture in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(pixels(answer)[0], picture)


def test_pictures_have_no_addresses_where_another_replica_would_be_asked_for_them(address):
    status, said = ask(address, response_format="url", seed=0)
    assert status == 400
    assert "take b64_json" in said["error"]["message"]


def test_a_replica_refuses_what_its_queue_does_not_hold(address):
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda seed: ask(address, seed=seed, n=4), range(24)))
    statuses = {status for status, _ in answers}
    assert statuses == {200, 429}
    assert all("error" in said for status, said in answers if status == 429)


def test_more_replicas_come_under_load_and_make_the_same_bytes(address):
    before, until = ask(address, seed=3)[1], time.monotonic() + 120
    with ThreadPoolExecutor(8) as clients:
        while replicas() < 2 and time.monotonic() < until:
            list(clients.map(lambda seed: ask(address, seed=seed), range(40)))
        assert replicas() == 2
        answers = list(clients.map(lambda _: ask(address, seed=3), range(8)))
    painted = [pixels(answer)[0] for status, answer in answers if status == 200]
    assert painted
    for picture in painted:
        np.testing.assert_array_equal(picture, pixels(before)[0])


def test_a_killed_replica_is_replaced_and_the_service_goes_on(address):
    (victim, *_), before = processes(), processes()
    os.kill(victim, signal.SIGKILL)
    until = time.monotonic() + 120
    while not (processes() - before) and time.monotonic() < until:
        status, _ = ask(address, seed=1)
        assert status in {200, 429, 500, 503}, "nobody waits for a dead one"
        time.sleep(0.2)
    assert processes() - before, "Ray starts another"
    while ask(address, seed=1)[0] != 200:
        assert time.monotonic() < until
        time.sleep(0.2)


def test_bounds_that_make_no_sense_are_refused(tiny_bundle):
    with pytest.raises(AccuQuantError, match="3 to 2 replicas"):
        ray_serve.deployment(ray_serve.Serving([tiny_bundle.folder], 3, 2))
    with pytest.raises(AccuQuantError, match="is not a bundle"):
        ray_serve.deployment(ray_serve.Serving([tiny_bundle.folder / "absent"]))


def test_the_command_serves_until_it_is_told_to_stop(tiny_bundle):
    port = free_port()
    command = "import sys; sys.argv[0] = 'accuquant-serve'; from accuquant.runtime.cli_serve import main; main()"
    arguments = ["ray", str(tiny_bundle.folder), "--port", str(port), "--most", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        said = []
        while not (found := re.search(r"listening on (http://\S+)", said[-1] if said else "")):
            said.append(process.stdout.readline())
            assert said[-1], f"it ended: {said}"
        assert ask(found[1], seed=1)[0] == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "all that was accepted is answered" in rest
