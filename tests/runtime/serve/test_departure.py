"""Who does not read what was asked for is cut off and holds nothing; who reads slowly is waited for."""

import json
import socket
import time

import numpy as np
import pytest
from accuquant.runtime.serve.server import Limits

SIDE = 1024  # of noise: 4 MiB in base64, which is more than the system keeps for a reader
STREAM = {"seed": 1, "n": 4, "stream": True, "partial_images": 1}


@pytest.fixture
def painter(house):
    """Paints what no format makes small."""
    painter = house.by_hand()
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    painter.pipeline.pictures = lambda latents: np.stack([noise] * len(latents))
    return painter


def asked(address, body, kept, connection="keep-alive"):
    """A connection that has sent a request, for which the system keeps so many bytes that were not read."""
    host, port = address.removeprefix("http://").split(":")
    reader, content = socket.socket(), json.dumps(body).encode()
    reader.settimeout(30)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, kept)
    reader.connect((host, int(port)))
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: {connection}\r\n\r\n"
    )
    reader.sendall(head.encode() + content)
    return reader


def until_closed(reader, pause=0.0):
    """All that can be read, with a rest after every MiB."""
    answer, rested = bytearray(), 0
    try:
        while got := reader.recv(2**16):
            answer += got
            if len(answer) - rested > 2**20:
                rested = len(answer)
                time.sleep(pause)
    except ConnectionResetError:
        pass
    return bytes(answer)


@pytest.mark.parametrize(
    ("body", "connection"),
    [(STREAM, "keep-alive"), ({"seed": 1, "n": 2}, "keep-alive"), ({"seed": 1, "n": 2}, "close")],
    ids=["a stream", "a large answer", "the last answer of a connection"],
)
def test_who_does_not_read_is_cut_off(house, painter, body, connection):
    with house.running([painter], Limits(reading_seconds=0.5)) as (address, _):
        with asked(address, body, 4096, connection) as reader:
            end = time.monotonic() + 20
            while "accuquant_unread_total 1.0" not in house.ask(address, "/metrics")[2].decode():
                assert time.monotonic() < end, "it was never cut off"
                time.sleep(0.05)
            answer = until_closed(reader)
        assert answer.startswith(b"HTTP/1.1 200")
        assert not answer.endswith((b"}", b"\r\n0\r\n\r\n")), "it came whole"
        metrics = house.ask(address, "/metrics")[2].decode()
        assert 'accuquant_painting_pictures{model="hand"} 0.0' in metrics
        assert ("accuquant_disconnects_total 1.0" in metrics) == (body is STREAM)
        assert house.ask(address, body={"seed": 2})[0] == 200


def test_who_reads_slowly_gets_everything(house, painter):
    """Every event has the time for itself."""
    with house.running([painter], Limits(reading_seconds=3.0)) as (address, _):
        begun = time.monotonic()
        with asked(address, STREAM, 2**20, "close") as reader:
            answer = until_closed(reader, pause=0.25)
        assert answer.endswith(b"\r\n0\r\n\r\n")
        assert answer.count(b"event: image_generation.completed") == 4
        assert time.monotonic() - begun > 3.0
        assert "accuquant_unread_total 0.0" in house.ask(address, "/metrics")[2].decode()
