"""The load tool tells pictures, refusals and losses apart, and says which of them must not be."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PICTURE = b'HTTP/1.1 200 OK\r\n\r\n{"data": []}'
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\n\r\n{}"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    try:
        import bench_serving

        yield bench_serving
    finally:
        sys.path.remove(str(TOOLS))


def under_load(bench, answers, load):
    """What `load(target)` returns, of a server that gives these answers in turn."""
    count = iter(range(10**6))

    async def answer(reader, writer):
        await reader.readuntil(b"}")
        writer.write(answers[next(count) % len(answers)])
        writer.close()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await load(bench.Target(*server.sockets[0].getsockname()[:2], 5.0))

    return asyncio.run(main())


def test_open_loops_ask_at_their_rate_and_count_every_answer(bench):
    tally = under_load(bench, [PICTURE, REFUSED], lambda target: bench.open_loop(target, 200.0, 1.0, 0))
    assert set(tally.statuses) == {200, 429}
    assert abs(tally.statuses[200] - tally.statuses[429]) <= 1
    assert 140 < sum(tally.statuses.values()) < 260, "a Poisson count of mean 200, four deviations to either side"
    assert len(tally.accepted) == tally.statuses[200]
    assert tally.untold == 0


def test_closed_loops_ask_again_when_answered(bench):
    tally = under_load(bench, [PICTURE], lambda target: bench.closed_loop(target, 3, 0.3))
    assert tally.statuses[200] > 6


@pytest.mark.parametrize("broken", [b"", PICTURE[:-3], b"garbage"])
def test_answers_that_do_not_arrive_whole_are_losses(bench, broken):
    tally = under_load(bench, [broken], lambda target: bench.closed_loop(target, 1, 0.05))
    assert set(tally.statuses) == {0}


def result(bench, **statuses):
    tally = bench.Tally()
    for name, seconds in statuses.items():
        tally.add(int(name[1:]), seconds, 1.0)
    return {
        "phase": "open",
        "statuses": {str(status): count for status, count in tally.statuses.items()},
        "accepted_seconds": bench.percentiles(tally.accepted),
        "refusals_without_retry_after": tally.untold,
    }


def test_what_must_not_be_is_said(bench):
    assert bench.faults([result(bench, s200=1.0, s429=0.1)], 5.0) == []
    assert "answers other than" in bench.faults([result(bench, s200=1.0, s0=5.0)], 5.0)[0]
    assert "answers other than" in bench.faults([result(bench, s504=5.0)], 5.0)[0]
    assert "beyond the deadline" in bench.faults([result(bench, s200=6.0)], 5.0)[0]
    silent = result(bench, s200=1.0) | {"refusals_without_retry_after": 2}
    assert "when to come again" in bench.faults([silent], 5.0)[0]


def test_a_leak_is_told_from_memory_that_settles(bench):
    settles = [(float(s), 200 + min(s, 50) + s % 3) for s in range(600)]
    leaks = [(s, mib + s / 10) for s, mib in settles]
    assert abs(bench.line(settles)["rises_mib"]) < 1
    assert abs(bench.line(leaks)["mib_per_hour"] - 360) < 5
    soak = result(bench, s200=1.0) | {"phase": "soak"}
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
