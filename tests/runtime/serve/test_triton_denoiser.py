"""The network alone on a real Triton: the ONNX Runtime backend computes what the engine does, whoever is in a batch."""

import http.client
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.serve.triton import Serving, write_repository

REAL, BACKENDS = "ACCUQUANT_TRITON", "ACCUQUANT_TRITON_BACKENDS"
BATCH, CALLS = 4, 16

pytestmark = [
    pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no Python that has nvidia-pytriton"),
    pytest.mark.skipif(BACKENDS not in os.environ, reason=f"{BACKENDS} names no folder; see tools/triton_server.py"),
]


@pytest.fixture(scope="module")
def bundles(tiny_bundle, class_bundle, text_bundle):
    return {"plain": tiny_bundle, "classes": class_bundle, "text": text_bundle}


@pytest.fixture(scope="module")
def address(bundles, tmp_path_factory):
    tools = str(Path(__file__).parents[3] / "tools")
    sys.path.insert(0, tools)
    try:
        from triton_server import started
    finally:
        sys.path.remove(tools)
    folder = tmp_path_factory.mktemp("triton")
    for name, bundle in bundles.items():
        write_repository(bundle, folder / "repository", Serving(name, BATCH, threads=1, delay=0.1, denoiser=True))
    server = started(os.environ[REAL], folder, folder / "repository")
    yield server.http
    server.stop()


def ask(address, path, body=None):
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
    answer = json.load(connection.getresponse())
    assert "error" not in answer, answer
    return answer


def infer(address, model, fed):
    kinds = {"float32": "FP32", "int64": "INT64", "float16": "FP16"}
    told = [
        {"name": name, "datatype": kinds[value.dtype.name], "data": value.ravel().tolist(),
         "shape": list(value.shape) if value.ndim > 1 else [len(value), 1]}
        for name, value in fed.items()
    ]  # fmt: skip
    (out,) = ask(address, f"/v2/models/{model}-denoiser/infer", {"inputs": told})["outputs"]
    return np.array(out["data"], np.float32).reshape(out["shape"])


def calls(engine, timesteps):
    """Rows as a loop of one's own would send them, each with a latent and a condition of its own."""
    drawn, many = np.random.default_rng(0), []
    for n in range(CALLS):
        ports = {port.name: (port.shape[1:], port.dtype) for port in engine.inputs}
        row = {
            name: drawn.integers(0, 3, (1, *shape)) if dtype == np.int64 else drawn.standard_normal((1, *shape))
            for name, (shape, dtype) in ports.items()
        }
        row["t"] = np.array([timesteps[n % len(timesteps)]])
        many.append({name: value.astype(ports[name][1]) for name, value in row.items()})
    return many


@pytest.mark.parametrize("name", ["plain", "classes", "text"])
def test_a_loop_of_ones_own_gets_what_the_engine_computes(address, bundles, name):
    bundle = bundles[name]
    path, target = bundle.graph("denoiser"), bundle.manifest.target
    engine = open_engine(path, EngineOptions(batch=1, threads=1), "onnxruntime", target)
    asked = calls(engine, sorted(bundle.plan.timesteps))
    wanted = [engine.run(row).copy() for row in asked]

    def counted():
        (stats,) = ask(address, f"/v2/models/{name}-denoiser/stats")["model_stats"]
        return stats["inference_count"], stats["execution_count"]

    before = counted()
    with ThreadPoolExecutor(CALLS) as strangers:
        got = list(strangers.map(lambda row: infer(address, name, row), asked))
    inferences, executions = (now - then for now, then in zip(counted(), before, strict=True))
    assert inferences == CALLS
    assert executions < CALLS, "nobody was merged with anybody"
    alone = [infer(address, name, row) for row in asked]
    noise = [
        np.square(np.concatenate(some) - np.concatenate(wanted)).sum() / np.square(np.concatenate(wanted)).sum()
        for some in (got, alone)
    ]
    assert max(noise) < 1e-6
