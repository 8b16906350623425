"""On Ray Serve: the pictures are the pipeline's whoever else asks, and a killed replica costs no picture."""

import base64
import io
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from accuquant.runtime import Pipeline
from accuquant.runtime.errors import AccuQuantError
from PIL import Image

ray = pytest.importorskip("ray", reason="Ray is not installed; it comes with accuquant[ray]")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed; it comes with accuquant[ray]")
from accuquant.runtime.serve import on_ray_serve  # noqa: E402

# On a busy machine a process takes longer to start than Ray waits for it.
PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "600",
    "RAY_worker_register_timeout_seconds": "600", "RAY_prestart_worker_first_driver": "0",
}  # fmt: skip
STEPS, BATCH, REPLICAS = 1500, 2, 2


@pytest.fixture(scope="module")
def bundle(handmade, tmp_path_factory):
    """Its pictures take long enough for a replica to be killed over them."""
    folder = tmp_path_factory.mktemp("served") / "handmade"
    handmade.seed_bundle(folder, STEPS)
    return folder


@pytest.fixture(scope="module")
def address(bundle):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, patience in PATIENCE.items():
            patch.setenv(name, patience)
        for module in ("api", "client"):
            patch.setattr(f"ray.serve._private.{module}.HTTP_PROXY_TIMEOUT", 600, raising=False)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 600})
        serve.run(on_ray_serve.deployment(bundle, batch=BATCH, least_replicas=REPLICAS, most_replicas=REPLICAS))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def expected(bundle):
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        return pipeline.pictures(pipeline.generate(range(40)))


def pixels(datum):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))))


def replicas():
    """Process numbers of those that paint."""
    found = ray.util.state.list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return [actor.pid for actor in found if "painters" in (actor.name or "")]


@pytest.mark.slow
def test_pictures_are_the_pipelines_whoever_else_asks(house, address, expected):
    with ThreadPoolExecutor(8) as crowd:
        asked = [crowd.submit(house.ask, address, body={"seed": s, "n": 2}, timeout=600) for s in range(0, 24, 2)]
        for number, answer in enumerate(asked):
            status, _, body = answer.result()
            assert status == 200, body
            for k, datum in enumerate(body["data"]):
                assert datum["seed"] == 2 * number + k
                np.testing.assert_array_equal(pixels(datum), expected[2 * number + k][:, :, 0])


@pytest.mark.slow
def test_a_picture_alone_or_a_refusal(house, address, expected):
    status, headers, file = house.ask(address, body={"seed": 3}, headers={"Accept": "image/png"}, timeout=600)
    assert (status, headers["Content-Type"], headers["X-Seed"]) == (200, "image/png", "3")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), expected[3][:, :, 0])
    for body, code, words in (({"n": 99}, 400, "at most"), ({"prompt": "cat"}, 400, "no prompt"), ({"x": 1}, 400, "x")):
        status, _, answer = house.ask(address, body=body, timeout=600)
        assert status == code
        assert words in answer["error"]["message"]
    assert house.ask(address, raw=b'{"prompt": "' + b"x" * 70000 + b'"}', timeout=600)[0] == 413


@pytest.mark.slow
def test_a_killed_replica_costs_no_picture(house, address, expected):
    before = replicas()
    assert len(before) == REPLICAS
    with ThreadPoolExecutor(16) as crowd:
        asked = [crowd.submit(house.ask, address, body={"seed": s}, timeout=600) for s in range(40)]
        while not any(answer.done() for answer in asked):
            time.sleep(0.05)
        os.kill(before[0], signal.SIGKILL)
        assert not all(answer.done() for answer in asked)
        answers = [answer.result() for answer in asked]
    assert [status for status, _, _ in answers] == [200] * 40
    for seed, (_, _, body) in enumerate(answers):
        np.testing.assert_array_equal(pixels(body["data"][0]), expected[seed][:, :, 0])
    assert before[0] not in replicas()


def test_a_damaged_bundle_is_refused_before_any_replica_starts(bundle, tmp_path, handmade):
    handmade.seed_bundle(tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "denoiser.onnx", 20)
    with pytest.raises(AccuQuantError, match=r"denoiser\.onnx is not the file"):
        on_ray_serve.deployment(tmp_path / "cut")
