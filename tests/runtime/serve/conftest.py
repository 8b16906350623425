"""A server on a port of its own, in a thread; and a bundle whose pictures take as long as a test wants."""

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.plan import PlanStep, SamplingPlan
from accuquant.runtime.serve import painter as painting
from accuquant.runtime.serve.listen import serve
from accuquant.runtime.serve.painter import Painter
from accuquant.runtime.serve.server import Server

ROWS = 4
CONSTANT = SamplingPlan(
    sampler="Hand", prediction_type="sample", init_sigma=1.0,
    steps=tuple(PlanStep(timestep=ROWS - i, a=1.0, b={i: 0.0}) for i in range(ROWS)),
)  # fmt: skip


class Hand:
    """A pipeline that paints by hand: flat pictures of a shade that the seed decides, one row of the plan a stroke.

    The twin paints one level lighter. While `hold` is not set, it waits before every stroke until `step` lets it make
    one. `painted` holds the seeds of every batch that was begun, `asked` what else the last was called with.
    """

    def __init__(self, bundle, *, network="denoiser", batch=2, guidance=None, **_):
        self.bundle, self.batch, self.plan, self.network = bundle, batch, CONSTANT, network
        strength = 1.0 if guidance is None else guidance
        self.denoiser = SimpleNamespace(guidance=strength, is_guided=strength != 1.0)
        self.engine = SimpleNamespace(name="by hand")
        self.hold, self.strokes, self.painted, self.closed = threading.Event(), 0, [], False
        self.hold.set()
        self.steps = threading.Semaphore(0)
        self.step = self.steps.release

    def generate(self, seeds, *, classes=None, prompts=None, unwanted=(), guidance=None, on_output=None):
        self.painted.append(list(seeds))
        self.asked = {"classes": classes, "prompts": prompts, "unwanted": unwanted, "guidance": guidance}
        x = np.stack([np.full((1, 4, 4), (seed % 100) / 50 - 1, np.float32) for seed in seeds])
        for row in range(ROWS):
            while not (self.hold.wait(0.005) or self.steps.acquire(blocking=False)):
                pass
            self.strokes += 1
            if 666 in seeds:
                raise AccuQuantError("the devil's seed")
            if 667 in seeds:
                raise ValueError("/home/somebody/model.onnx")
            on_output(row, x, x)
        return x

    def pictures(self, latents):
        return np.rint((latents.transpose(0, 2, 3, 1) + 1) * 50).astype(np.uint8) + (self.network == "twin")

    def close(self):
        self.closed = True


def shade(seed):
    """Of every pixel of a picture by Hand."""
    return seed % 100


def by_hand(conditioning=None, name="hand", network="denoiser", **settings):
    """A painter of such pictures, two at once."""
    manifest = SimpleNamespace(scheme="W8A8", conditioning=conditioning, sample_shape=(1, 4, 4), sampler="hand")
    bundle = SimpleNamespace(folder=Path(name), manifest=manifest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painting, "Pipeline", Hand)
        return Painter(bundle, network, **{"batch": 2} | settings)


@contextmanager
def running(painters, limits=None, api_key=None):
    """Address and Server; told to end when the block ends, and waited for."""
    server, ready, loop = Server(painters, limits), threading.Event(), asyncio.new_event_loop()
    told, address = asyncio.Event(), []
    listener = socket.create_server(("127.0.0.1", 0))

    def listening(where):
        address.append(where)
        ready.set()

    server.stop = lambda: loop.call_soon_threadsafe(told.set)
    thread = threading.Thread(
        target=loop.run_until_complete, args=(serve(server, listener, api_key, listening, told),), daemon=True
    )
    thread.start()
    assert ready.wait(60)
    try:
        yield address[0], server
    finally:
        for painter in painters:
            getattr(painter.pipeline, "hold", threading.Event()).set()
        server.stop()
        thread.join(30)
        listener.close()
        assert not thread.is_alive(), "the server does not end"


def ask(address, path="/v1/images/generations", body=None, *, raw=None, headers=None, timeout=30):
    """(status, headers, JSON or text) of a request; POST if there is a body."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        address + path, data=data, headers={"Content-Type": "application/json"} | (headers or {})
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            status, got, text = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        status, got, text = error.code, error.headers, error.read()
    return status, got, json.loads(text) if got.get_content_type() == "application/json" else text


@pytest.fixture(scope="session")
def house():
    """The names above, for tests, which are no package to import from."""
    return SimpleNamespace(by_hand=by_hand, running=running, ask=ask, shade=shade, rows=ROWS)
