"""Overload, impatience and malice: every refusal says why, nothing hangs, nobody is held up by anybody."""

import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from accuquant.runtime.serve.server import Limits
from accuquant.runtime.serve.store import PictureStore


@pytest.fixture
def painter(house):
    return house.by_hand()


def until(condition, seconds=30):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def left_behind(address, body):
    """A connection that has sent a request and reads nothing."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_too_many_are_refused_and_told_when_to_come_again_and_the_accepted_are_all_answered(house, painter):
    with house.running([painter], Limits(waiting=4)) as (address, _), ThreadPoolExecutor(21) as crowd:
        painter.pipeline.hold.clear()
        busy = crowd.submit(house.ask, address, body={"seed": 30, "n": 2})
        until(lambda: painter.pipeline.painted[-1] == [30, 31])
        answers = [crowd.submit(house.ask, address, body={"seed": seed}) for seed in range(20)]
        until(lambda: sum(a.done() for a in answers) == 16)
        painter.pipeline.hold.set()
        answers = [a.result(30) for a in answers]
        assert busy.result(30)[0] == 200
        accepted = [a for a in answers if a[0] == 200]
        assert len(accepted) == 4
        for status, headers, body in answers:
            if status != 200:
                assert status == 429
                assert int(headers["Retry-After"]) >= 1
                assert body["error"]["code"] == "queue_full"
                assert "4 pictures are waiting" in body["error"]["message"]
        assert len({a[2]["data"][0]["b64_json"] for a in accepted}) == 4


def test_the_official_client_reads_refusals_as_rate_limits(house, painter):
    with house.running([painter], Limits(waiting=1)) as (address, _):
        painter.pipeline.hold.clear()
        held = [left_behind(address, {"seed": 1, "n": 2}), None]
        until(lambda: painter.pipeline.painted[-1] == [1, 2])
        held[1] = left_behind(address, {"seed": 3})
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        until(lambda: 'accuquant_queue_pictures{model="hand"} 1.0' in house.ask(address, "/metrics")[2].decode())
        with pytest.raises(openai.RateLimitError, match="try again in"):
            client.images.generate(prompt="")


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_stops_for_who_left(house, painter, stream):
    with house.running([painter]) as (address, server):
        painter.pipeline.hold.clear()
        before = painter.pipeline.strokes
        connection = left_behind(address, {"seed": 1, "stream": stream, "partial_images": 3})
        until(lambda: painter.pipeline.painted[-1] == [1])
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        worker = server.workers["hand"]
        until(lambda: "accuquant_disconnects_total 1.0" in server.metrics.text().decode())
        painter.pipeline.hold.set()
        until(lambda: not worker.painting)
        assert painter.pipeline.strokes < before + house.rows
        assert house.ask(address, body={"seed": 2})[0] == 200


def test_a_request_ends_at_its_deadline_and_its_place_is_free(house, painter):
    with house.running([painter], Limits(deadline=20.0)) as (address, server):
        painter.pipeline.hold.clear()
        status, _, body = house.ask(address, body={"seed": 1, "deadline": 1.0})
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert "not ready within 1 s" in body["error"]["message"]
        status, _, text = house.ask(address, body={"seed": 1, "deadline": 1.0, "stream": True})
        assert status == 200
        assert b"event: error" in text
        assert b"deadline_exceeded" in text
        until(lambda: server.workers["hand"].waiting == 0)  # the stream ends before what made it is cleared away


def test_a_picture_that_cannot_be_painted_is_an_error_of_its_own(house, painter):
    with house.running([painter]) as (address, _), ThreadPoolExecutor(3) as crowd:
        painter.pipeline.hold.clear()
        busy = crowd.submit(house.ask, address, body={"seed": 5})
        until(lambda: painter.pipeline.painted[-1] == [5])
        both = [crowd.submit(house.ask, address, body={"seed": seed}) for seed in (666, 7)]
        until(lambda: 'accuquant_queue_pictures{model="hand"} 2.0' in house.ask(address, "/metrics")[2].decode())
        painter.pipeline.hold.set()
        statuses = {seed: future.result(20) for seed, future in zip((666, 7), both, strict=True)}
        assert busy.result(20)[0] == 200
        assert statuses[7][0] == 200
        assert statuses[666][0] == 500
        assert "the devil's seed" in statuses[666][2]["error"]["message"]
        assert house.ask(address, "/health/ready")[0] == 200


def test_what_libraries_say_stays_in_the_log(house, painter, caplog):
    with house.running([painter]) as (address, _):
        status, _, body = house.ask(address, body={"seed": 667})
    assert status == 500
    assert "the server's log says how" in body["error"]["message"]
    assert "somebody" not in body["error"]["message"]
    assert "/home/somebody/model.onnx" in caplog.text


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"", 400, "must be a JSON object"),
        (b"{", 400, "no JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"null", 400, "must be a JSON object"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 20000, 400, ""),
        (b'{"seed": 1e999}', 400, "seed"),
        (b'{"guidance_scale": NaN}', 400, "guidance_scale"),
        (b'{"prompt": "\\ud800"}', 400, "prompt"),
        (b'{"prompt": 7}', 400, "prompt"),
        (b'{"n": true}', 400, "n: "),
        (b'{"prompt": "' + b"x" * 5000 + b'"}', 400, "prompt"),
        (b'{"stream": true, "response_format": "url"}', 400, "streams carry b64_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b'{"prompt": "' + b"x" * 70000 + b'"}', 413, "larger than 65536 bytes"),
    ],
)
def test_malformed_bodies_are_refused_in_words(house, running_by_hand, raw, status, words):
    got, _, body = house.ask(running_by_hand, raw=raw)
    assert got == status, body
    assert body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]


@pytest.fixture(scope="module")
def running_by_hand(house):
    with house.running([house.by_hand()], Limits(sending_seconds=0.5)) as (address, _):
        yield address


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_are_json_and_say_so(house, running_by_hand, kind):
    """A page of another site could send these without asking first."""
    status, _, body = house.ask(running_by_hand, raw=b'{"seed": 1}', headers={"Content-Type": kind})
    assert status == 415
    assert "application/json" in body["error"]["message"]


def test_bodies_without_a_length_are_counted_too(house, running_by_hand):
    def endless():
        while True:
            yield b"x" * 4096

    connection = http.client.HTTPConnection(running_by_hand.removeprefix("http://"), timeout=30)
    try:
        connection.request(
            "POST", "/v1/images/generations", endless(), {"Content-Type": "application/json"}, encode_chunked=True
        )
        status = connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):  # it was closed while we went on sending
        status = 413
    assert status == 413
    assert house.ask(running_by_hand, "/health/live")[0] == 200


def test_who_sends_too_slowly_is_sent_away(house, running_by_hand):
    host, port = running_by_hand.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        head = "POST /v1/images/generations HTTP/1.1", "Host: a", "Content-Type: application/json", "Content-Length: 9"
        slow.sendall("\r\n".join([*head, "", "{"]).encode())
        answer = b"".join(iter(lambda: slow.recv(65536), b"")).decode()  # until it closes
    assert answer.startswith("HTTP/1.1 408")
    assert "did not arrive within 0.5 s" in answer


def dripped(connection, head, seconds):
    """What comes back while bytes of a head are sent one by one, until it is closed; b"" if nothing does."""
    answer, end = b"", time.monotonic() + seconds
    connection.settimeout(0.02)
    for byte in itertools.cycle(head):
        assert time.monotonic() < end, "it was never closed"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(bytes([byte]))
        try:
            got = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionResetError:  # a byte of ours came after it was closed
            return answer
        answer += got
        if not got:
            return answer
    return answer


def answered(connection):
    """A whole answer of /health/live; its head and its body may come apart."""
    got = b""
    while not got.endswith(b'{"status":"alive"}'):
        more = connection.recv(65536)
        assert more, got
        got += more
    return got


def connected(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize("later", [False, True], ids=["first", "second request"])
def test_heads_that_trickle_in_are_cut_off_and_others_answered_meanwhile(house, running_by_hand, later):
    with connected(running_by_hand) as slow, ThreadPoolExecutor(1) as aside:
        if later:
            slow.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
            assert answered(slow).startswith(b"HTTP/1.1 200")
        answer = aside.submit(dripped, slow, b"GET /health/live HTTP/1.1\r\nX: a", 10)
        for _ in range(5):
            assert house.ask(running_by_hand, "/health/live", timeout=5)[0] == 200
        answer = answer.result(20).decode()
    assert answer.startswith("HTTP/1.1 408"), answer
    assert "the head did not arrive within 0.5 s" in answer
    assert "connection: close" in answer


def test_connections_that_never_ask_are_closed_all_of_them(house, running_by_hand):
    idle = [connected(running_by_hand) for _ in range(50)]
    begun = time.monotonic()
    assert house.ask(running_by_hand, body={"seed": 1})[0] == 200
    for connection in idle:
        with connection:
            assert connection.recv(1) == b""
    assert time.monotonic() - begun < 8


def test_a_head_in_pieces_that_arrives_in_time_is_answered_and_what_follows_it_too(running_by_hand):
    """Painting and keeping alive are no part of the time that a head has."""
    with connected(running_by_hand) as patient:
        for _ in range(3):
            for piece in (b"GET /health/live HT", b"TP/1.1\r\nHost: a\r\n", b"\r\n"):
                patient.sendall(piece)
                time.sleep(0.05)
            assert answered(patient).startswith(b"HTTP/1.1 200")
            time.sleep(0.7)


def test_a_picture_that_takes_longer_than_a_head_may_is_answered(house, painter):
    with house.running([painter], Limits(sending_seconds=0.3)) as (address, _), ThreadPoolExecutor(1) as aside:
        painter.pipeline.hold.clear()
        answer = aside.submit(house.ask, address, body={"seed": 1})
        until(lambda: painter.pipeline.painted[-1] == [1])
        time.sleep(0.6)
        painter.pipeline.hold.set()
        assert answer.result(20)[0] == 200


@pytest.mark.parametrize("path", ["/nothing", "/v1/images/generations", "/images/x.png", "/v1/models/other"])
def test_other_paths_answer_in_the_same_form(house, running_by_hand, path):
    status, _, body = house.ask(running_by_hand, path)
    assert status in (404, 405)
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_a_reader_who_does_not_read_holds_nobody_up(house, painter):
    with house.running([painter]) as (address, _):
        lazy = [left_behind(address, {"seed": 1, "n": 2, "stream": True, "partial_images": 3}) for _ in range(5)]
        begun = time.monotonic()
        assert house.ask(address, body={"seed": 2})[0] == 200
        assert time.monotonic() - begun < 20
        del lazy


def test_the_loop_answers_while_an_engine_is_busy(house, painter):
    with house.running([painter]) as (address, _):
        painter.pipeline.hold.clear()
        kept = left_behind(address, {"seed": 1})
        until(lambda: painter.pipeline.painted[-1] == [1])
        begun = time.monotonic()
        for _ in range(20):
            assert house.ask(address, "/health/live")[0] == 200
        assert time.monotonic() - begun < 20
        kept.close()


def test_the_key_is_asked_for_before_anything_is_read(house, painter):
    with house.running([painter], api_key="secret") as (address, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, _, body = house.ask(address, body={"seed": 1}, headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert house.ask(address, "/v1/models", headers=headers)[0] == 401
        assert house.ask(address, body={"seed": 1}, headers={"Authorization": "Bearer secret"})[0] == 200
        assert house.ask(address, "/health/ready")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_clock_that_jumps_moves_no_deadline_and_no_retry_after(house, painter, monkeypatch):
    """By a year to and fro, as after a wrong clock was set right."""
    jumps, real = itertools.cycle((0.0, 3e7, -3e7)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with house.running([painter], Limits(waiting=1, deadline=20.0)) as (address, server):
        _, _, body = house.ask(address, body={"seed": 1, "response_format": "url"})
        assert house.ask(address, body["data"][0]["url"].removeprefix(address))[0] == 200  # kept for minutes
        painter.pipeline.hold.clear()
        begun = time.monotonic()
        status, _, body = house.ask(address, body={"seed": 1, "deadline": 1.0})
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert 0.9 < time.monotonic() - begun < 15
        painter.pipeline.step()  # with which the engine notices
        held = [left_behind(address, {"seed": 2})]
        until(lambda: painter.pipeline.painted[-1] == [2])
        held.append(left_behind(address, {"seed": 3}))
        until(lambda: server.workers["hand"].waiting == 1)
        status, headers, _ = house.ask(address, body={"seed": 4})
        assert status == 429
        assert 1 <= int(headers["Retry-After"]) < 60


def test_draining_answers_what_was_accepted_and_refuses_the_rest(house, painter):
    with house.running([painter]) as (address, server), ThreadPoolExecutor(3) as crowd:
        painter.pipeline.hold.clear()
        accepted = [crowd.submit(house.ask, address, body={"seed": 1, "n": 2})]
        until(lambda: painter.pipeline.painted[-1] == [1, 2])
        accepted.append(crowd.submit(house.ask, address, body={"seed": 3, "n": 2}))
        until(lambda: server.workers["hand"].waiting == 2)
        server.stop()
        until(lambda: server.draining)
        status, headers, body = house.ask(address, body={"seed": 9})
        assert (status, body["error"]["code"]) == (503, "draining")
        assert headers["Retry-After"]
        assert house.ask(address, "/health/ready")[0] == 503
        assert house.ask(address, "/health/live")[0] == 200
        painter.pipeline.hold.set()
        assert [answer.result(20)[0] for answer in accepted] == [200, 200]
        until(lambda: painter.pipeline.closed)


def test_kept_pictures_make_room_and_expire():
    now = [0.0]
    store = PictureStore(most_bytes=250, seconds=10, clock=lambda: now[0])
    first, second, third = (store.put(bytes(100), "png") for _ in range(3))
    assert store.get(first) is None
    assert store.get(second).media_type == "image/png"
    assert store.bytes == 200
    now[0] = 11.0
    assert store.get(third) is None
    assert store.bytes == 0
    assert len(first) > 30


def test_many_threads_asking_at_once_all_get_their_own(house, painter):
    with house.running([painter], Limits(waiting=1000)) as (address, _), ThreadPoolExecutor(16) as crowd:
        answers = list(crowd.map(lambda seed: house.ask(address, body={"seed": seed}), range(60)))
    assert all(status == 200 for status, _, _ in answers)
    by_shade = {house.shade(seed): body["data"][0]["b64_json"] for seed, (_, _, body) in enumerate(answers)}
    assert len(set(by_shade.values())) == 60
    assert threading.active_count() < 60
