"""The load tool tells pictures, refusals and losses apart, and says which of them must not be."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
REAL = "ACCUQUANT_TRITON"  # Python of an environment that has a server


def said(status, body, *headers):
    """An answer's bytes."""
    head = f"HTTP/1.1 {status} Words\r\n" + "".join(f"{line}\r\n" for line in headers)
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


PICTURE = said(200, '{"data": []}')
REFUSED = said(429, "{}", "Retry-After: 1")
QUEUE_FULL = said(503, '{"error":"[request id: <id_unknown>] Exceeds maximum queue size"}')
WAITED = said(503, '{"error":"Request timeout expired"}')


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    try:
        import bench_serving

        yield bench_serving
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module", params=["http", "triton"])
def front(bench, request):
    """What asks one front end, given address and deadline; what it takes for a refusal."""
    if request.param == "http":
        import front_http

        return front_http.HttpFront, [REFUSED]
    import front_triton

    return front_triton.TritonFront, [QUEUE_FULL, WAITED]


def under_load(asker, answers, load):
    """What `load(front)` returns, of a server that gives these answers in turn."""
    count = iter(range(10**6))

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
        writer.write(answers[next(count) % len(answers)])
        writer.close()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await load(asker(server.sockets[0].getsockname()[:2], 5.0))

    return asyncio.run(main())


def test_open_loops_ask_at_their_rate_and_count_every_answer(bench, front):
    asker, refusals = front
    tally = under_load(asker, [PICTURE, *refusals], lambda front: bench.open_loop(front, 200.0, 1.0, 0))
    assert not tally.failed
    assert abs(len(tally.accepted) * len(refusals) - len(tally.refused)) <= len(refusals)
    assert 140 < len(tally.accepted) + len(tally.refused) < 260, (
        "a Poisson count of mean 200, four deviations either way"
    )
    assert sum(tally.statuses.values()) == len(tally.accepted) + len(tally.refused)
    assert len(tally.statuses) == 1 + len(refusals), "every reason by its own words"


def test_closed_loops_ask_again_when_answered(bench, front):
    tally = under_load(front[0], [PICTURE], lambda front: bench.closed_loop(front, 3, 0.3))
    assert len(tally.accepted) > 6


@pytest.mark.parametrize("broken", [b"", PICTURE[:-3], b"garbage"])
def test_answers_that_do_not_arrive_whole_are_losses(bench, front, broken):
    tally = under_load(front[0], [broken], lambda front: bench.closed_loop(front, 1, 0.05))
    assert set(tally.failed) == {"no answer"}


@pytest.mark.parametrize(
    "strange", [said(500, "{}"), said(429, "{}"), said(503, '{"error":"failed to load"}')], ids=["500", "429", "503"]
)
def test_refusals_other_than_the_front_end_promises_are_failures(bench, front, strange):
    """For HTTP: without Retry-After. For Triton: by anything but its queue."""
    tally = under_load(front[0], [strange], lambda front: bench.closed_loop(front, 1, 0.05))
    assert not tally.accepted
    assert not tally.refused
    assert sum(tally.failed.values()) == 1


def result(bench, **seconds):
    """Of a phase in which one request of every outcome that is named took so long."""
    tally = bench.Tally()
    for outcome, took in seconds.items():
        tally.add(bench.Answer(outcome, "words"), took)
    return {
        "phase": "open",
        "failures": dict(tally.failed),
        "accepted_seconds": bench.percentiles(tally.accepted),
    }


def test_what_must_not_be_is_said(bench):
    assert bench.faults([result(bench, picture=1.0, refused=0.1)], 5.0) == []
    assert "answers other than" in bench.faults([result(bench, picture=1.0, failed=5.0)], 5.0)[0]
    assert "beyond the deadline" in bench.faults([result(bench, picture=6.0)], 5.0)[0]


def test_a_leak_is_told_from_memory_that_settles(bench):
    settles = [(float(s), 200 + min(s, 50) + s % 3) for s in range(600)]
    leaks = [(s, mib + s / 10) for s, mib in settles]
    assert abs(bench.line(settles)["rises_mib"]) < 1
    assert abs(bench.line(leaks)["mib_per_hour"] - 360) < 5
    soak = result(bench, picture=1.0) | {"phase": "soak"}
    assert bench.faults([soak | {"memory_line": bench.line(settles)}], 5.0) == []
    assert "memory rises by 60 MiB" in bench.faults([soak | {"memory_line": bench.line(leaks)}], 5.0)[0]


@pytest.mark.slow
def test_an_hour_at_capacity_loses_nothing_and_leaks_nothing(handmade, tmp_path):
    """Or as many seconds as ACCUQUANT_SOAK says."""
    seconds = os.environ.get("ACCUQUANT_SOAK", "3600")
    handmade.seed_bundle(tmp_path / "handmade", steps=50)
    tool = [sys.executable, TOOLS / "bench_serving.py", tmp_path / "handmade", "--threads", "1"]
    ended = subprocess.run(
        [*tool, "--soak", seconds, "--out", tmp_path / "soak.json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (report,) = json.loads((tmp_path / "soak.json").read_text())["results"]
    print(ended.stdout, report["memory_line"])
    assert set(report["statuses"]) == {"200"}
    assert report["requests"] > float(seconds)
    assert report["lasted_seconds"] >= float(seconds)


@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no Python that has nvidia-pytriton")
def test_a_real_triton_at_twice_its_capacity_paints_and_refuses(handmade, tmp_path):
    handmade.seed_bundle(tmp_path / "handmade", steps=200)
    tool = [sys.executable, TOOLS / "bench_serving.py", tmp_path / "handmade", "--front", "triton", "--threads", "1"]
    ended = subprocess.run(
        [*tool, "--seconds", "5", "--factors", "2", "--queue", "4", "--out", tmp_path / "load.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    closed, twice = json.loads((tmp_path / "load.json").read_text())["results"]
    assert closed["accepted_seconds"]["n"] > 0
    assert closed["memory_mib"][0] > 0
    assert twice["accepted_seconds"]["n"] > 0
    assert twice["refused_seconds"]["n"] > 0
