"""A server killed while it paints: who asked hears of it at once, and the next one starts as if nothing had been."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

COMMAND = "import sys; sys.argv[0] = 'accuquant-serve'; from accuquant.runtime.cli_serve import main; main()"
STEPS = 1000  # of a picture, so that ten take a while


@contextmanager
def serving(folder, port, cache):
    """A server's process and address."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "http", folder, "--port", str(port), "--batch", "1", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "ACCUQUANT_CACHE": str(cache)},
    )  # fmt: skip
    try:
        said = []
        while not (found := re.search(r"listening on (http://\S+) ", said[-1] if said else "")):
            said.append(process.stdout.readline())
            assert said[-1], f"it ended: {said}"
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def contents(*folders):
    """Digest of every file in there."""
    files = (p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file())
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_killed_server_is_heard_of_and_leaves_nothing_that_the_next_one_stumbles_over(handmade, house, tmp_path):
    folder, cache = tmp_path / "handmade", tmp_path / "cache"
    handmade.seed_bundle(folder, STEPS)
    cache.mkdir()
    before = contents(folder, cache)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(folder, port, cache) as (process, address), ThreadPoolExecutor(2) as crowd:
        first = house.ask(address, body={"seed": 1}, timeout=300)
        asked = crowd.submit(house.ask, address, body={"seed": 1, "n": 10}, timeout=300)
        end = time.monotonic() + 30
        while b'accuquant_painting_pictures{model="handmade"} 1.0' not in house.ask(address, "/metrics")[2]:
            assert time.monotonic() < end
        process.send_signal(signal.SIGKILL)
        with pytest.raises(OSError, match=r"(?i)remote end closed|reset"):
            asked.result(300)
    assert contents(folder, cache) == before
    with serving(folder, port, cache) as (_, address):  # at the same address at once
        again = house.ask(address, body={"seed": 1}, timeout=300)
    assert first[0] == again[0] == 200
    assert first[2]["data"] == again[2]["data"]
    assert contents(folder, cache) == before
