"""`accuquant-serve http` as a process: what it prints, how it ends on SIGTERM, what it says to mistakes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from accuquant.runtime import cli_serve

COMMAND = "import sys; sys.argv[0] = 'accuquant-serve'; from accuquant.runtime.cli_serve import main; main()"


@pytest.fixture
def serving(tiny_bundle):
    """A process that serves the tiny bundle, its address, and the lines it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "http", tiny_bundle.folder, "--port", "0", "--batch", "1", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    printed, found = [], None
    while found is None:
        line = process.stdout.readline()
        assert line, f"it ended: {printed}"
        printed.append(line)
        found = re.search(r"listening on (http://\S+) ", line)
    yield process, found[1], printed
    process.kill()
    process.wait()


def test_sigterm_finishes_what_was_accepted_and_exits_with_zero(serving, house):
    process, address, printed = serving
    assert "W4A8, 8x8, 6 steps, takes nothing, batch 1" in "".join(printed)
    with ThreadPoolExecutor(3) as crowd:
        answers = [crowd.submit(house.ask, address, body={"seed": seed, "n": 10}) for seed in (1, 2, 3)]
        end = time.monotonic() + 30
        while b'accuquant_painting_pictures{model="bundle"} 1.0' not in house.ask(address, "/metrics")[2]:
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        answers = [answer.result(60) for answer in answers]
    assert {status for status, _, _ in answers} <= {200, 503}
    assert answers[0][0] == 200 or answers[1][0] == 200 or answers[2][0] == 200
    for status, _, body in answers:
        assert len(body["data"]) == 10 if status == 200 else body["error"]["code"] == "draining"
    assert process.wait(30) == 0
    assert "stopped: all that was accepted is answered" in process.stdout.read()


def refusal(monkeypatch, capsys, *arguments):
    """The sentence with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["accuquant-serve", "http", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli_serve.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.startswith("error:")
    assert "Traceback" not in error
    return " ".join(error.split())


def test_a_truncated_bundle_is_never_served(tiny_bundle, tmp_path, monkeypatch, capsys):
    cut = shutil.copytree(tiny_bundle.folder, tmp_path / "cut")
    graph = cut / "denoiser.onnx"
    graph.write_bytes(graph.read_bytes()[:-1000])
    assert "denoiser.onnx is not the file the manifest describes" in refusal(monkeypatch, capsys, cut)


def test_a_taken_port_is_one_sentence(house, monkeypatch, capsys, tiny_bundle):
    """The engine is by hand: the address is what this is about."""
    from accuquant.runtime.serve import cli_http

    monkeypatch.setattr(cli_http, "Painter", lambda *_, **__: house.by_hand())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(monkeypatch, capsys, tiny_bundle.folder, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "choose another --port" in said


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys, tiny_bundle):
    from accuquant.runtime.serve import cli_http

    monkeypatch.setattr(cli_http.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'accuquant[serve]'" in refusal(monkeypatch, capsys, tiny_bundle.folder)
