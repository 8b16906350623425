"""The API as its official client sees it, on a real bundle: pictures, streams, models, errors."""

import base64
import io
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from accuquant.runtime.pipeline import Pipeline
from accuquant.runtime.serve.painter import Painter
from PIL import Image


@pytest.fixture(scope="module")
def served(tiny_bundle, house):
    """Address and server of the tiny bundle and its twin."""
    painters = [Painter(tiny_bundle, side, batch=4, threads=1) for side in ("denoiser", "twin")]
    with house.running(painters) as both:
        yield both


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def painted(client, seed, model="bundle", **more):
    """Pixels of the pictures, and their bytes."""
    answer = client.images.generate(prompt="", model=model, extra_body={"seed": seed}, **more)
    files = [base64.b64decode(datum.b64_json) for datum in answer.data]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files], files


@pytest.mark.parametrize("side", ["denoiser", "twin"])
def test_pictures_are_those_of_the_pipeline(client, tiny_bundle, side):
    pictures, _ = painted(client, 5, "bundle" if side == "denoiser" else "bundle:fp", n=3)
    with Pipeline(tiny_bundle, network=side, batch=4, threads=1) as pipeline:
        expected = pipeline.pictures(pipeline.generate([5, 6, 7]))
    np.testing.assert_array_equal(np.stack(pictures), expected[..., 0])


def test_a_seed_gives_the_same_bytes_alone_and_among_strangers(client, served, monkeypatch):
    _, alone = painted(client, 21)
    painter, worker = served[1].painters["bundle"], served[1].workers["bundle"]
    paint, gate, batches = painter.paint, threading.Event(), []

    def when_all_wait(wishes, on_row):
        assert gate.wait(30)
        batches.append([wish.seed for wish in wishes])
        return paint(wishes, on_row)

    monkeypatch.setattr(painter, "paint", when_all_wait)
    with ThreadPoolExecutor(12) as crowd:
        first = crowd.submit(painted, client, 2)
        until(lambda: worker.painting)
        among = [crowd.submit(painted, client, seed, n=1 + seed % 3) for seed in (3, 21, 8, 21, 40, 21, 7, 21)]
        until(lambda: worker.waiting == 12)
        gate.set()
        files = [future.result()[1] for future in [first, *among]]
    assert [len(batch) for batch in batches] == [1, 4, 4, 4], "strangers share batches"
    assert {files[k][0] for k in (2, 4, 6, 8)} == set(alone)
    assert len({file for some in files for file in some}) == len({2, 3, 7, 8, 9, 10, 21, 40, 41})


def test_without_a_seed_one_is_drawn_and_told(client):
    first, second = (client.images.generate(prompt="").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt="", extra_body={"seed": first.seed}).data[0]
    assert again.b64_json == first.b64_json


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats_and_urls(client, kind):
    answer = client.images.generate(prompt="", response_format="url", output_format=kind, extra_body={"seed": 1})
    with urllib.request.urlopen(answer.data[0].url) as found:
        assert found.headers["content-type"] == f"image/{kind}"
        image = Image.open(io.BytesIO(found.read()))
    assert image.format == kind.upper()
    assert image.size == (8, 8)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(answer.data[0].url[:-9] + ".png")


def test_previews_come_as_the_apis_own_events(client):
    events = list(client.images.generate(prompt="", stream=True, partial_images=2, extra_body={"seed": 4}))
    assert [event.type for event in events[-1:]] == ["image_generation.completed"]
    assert {event.type for event in events[:-1]} <= {"image_generation.partial_image"}
    assert events[-1].b64_json == client.images.generate(prompt="", extra_body={"seed": 4}).data[0].b64_json
    for event in events:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (8, 8)


def test_models_say_what_they_take(client):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"bundle", "bundle:fp"}
    assert found["bundle"].twin == "bundle:fp"
    assert (found["bundle"].takes, found["bundle"].size, found["bundle"].steps) == ("nothing", "8x8", 6)
    assert client.models.retrieve("bundle:fp").precision == "full precision"


@pytest.mark.parametrize(
    ("asked", "status", "parameter", "words"),
    [
        ({"prompt": "a cat"}, 400, "prompt", "takes no prompt"),
        ({"prompt": "", "size": "1024x1024"}, 400, "size", "paints 8x8"),
        ({"prompt": "", "n": 11}, 400, "n", "at most 10"),
        ({"prompt": "", "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": "", "output_format": "gif"}, 400, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"prompt": "", "extra_body": {"num_inference_steps": 20}}, 400, "num_inference_steps", "in 6 steps"),
        ({"prompt": "", "extra_body": {"guidance_scale": 4}}, 400, "guidance_scale", "takes no condition"),
        ({"prompt": "", "extra_body": {"seed": -1}}, 400, "seed", "greater than or equal to 0"),
        ({"prompt": "", "extra_body": {"seed": 2**64}}, 400, "seed", "less than"),
        ({"prompt": "", "extra_body": {"sede": 1}}, 400, "sede", "unknown parameter 'sede'"),
        ({"prompt": "", "model": "dall-e-3"}, 404, "model", "served: bundle, bundle:fp"),
    ],
)
def test_errors_have_the_apis_form(client, asked, status, parameter, words):
    with pytest.raises(openai.APIStatusError) as error:
        client.images.generate(**asked)
    assert error.value.status_code == status
    assert error.value.body["param"] == parameter
    assert error.value.body["type"] == "invalid_request_error"
    assert words in error.value.body["message"]


def test_the_extremes_of_seeds_are_painted(client):
    answer = client.images.generate(prompt="", n=2, extra_body={"seed": 2**64 - 1})
    assert [datum.seed for datum in answer.data] == [2**64 - 1, 0]
    assert answer.data[1].b64_json == client.images.generate(prompt="", extra_body={"seed": 0}).data[0].b64_json
