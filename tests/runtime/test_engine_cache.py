"""The engine cache: one build a key, whoever asks; nothing half-built is ever found; differences are named."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from accuquant.runtime.engine_cache import EngineCache, EngineKey
from accuquant.runtime.errors import AccuQuantError

KEY = EngineKey(graph="g", library="compiler 1.7.1", target="sm89", shapes="batch 1 to 16", options={"level": 3})

# A builder that says when it begins, takes its time and writes down that it built.
BUILDER = """
import sys, time
from pathlib import Path
from accuquant.runtime.engine_cache import EngineCache, EngineKey

folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def build(path):
    path.write_bytes(b"half")
    (folder / f"{name}.began").touch()
    time.sleep(seconds)
    path.write_bytes(b"whole engine of " + name.encode())
    return {"by": name}

key = EngineKey("g", "compiler 1.7.1", "sm89", "batch 1 to 16", {"level": 3})
found = EngineCache(folder).get(key, build, lambda: (folder / f"{name}.waits").touch())
print(found.facts["by"], found.built)
"""


def builder(folder, name, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), name, str(seconds)], stdout=subprocess.PIPE, text=True
    )


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def refuse(_):
    raise AssertionError("it was to be found, not built")


def written(data, **facts):
    def build(path):
        path.write_bytes(data)
        return facts

    return build


def test_built_once_and_found_afterwards(tmp_path):
    cache = EngineCache(tmp_path)
    first = cache.get(KEY, written(b"engine", kernels=3))
    again = cache.get(KEY, refuse)
    assert (first.built, again.built) == (True, False)
    assert again.path.read_bytes() == b"engine"
    assert again.facts == first.facts == {"kernels": 3}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("graph", "h"), ("library", "compiler 1.7.2"), ("target", "sm120"), ("shapes", "batch 8"),
        ("options", {"level": 4}),
    ],
)  # fmt: skip
def test_any_other_part_is_another_engine_and_the_difference_is_named(tmp_path, part, value):
    cache = EngineCache(tmp_path)
    cache.get(KEY, written(b"one"))
    other = EngineKey(**{**KEY.__dict__, part: value})
    made = cache.get(other, written(b"two"))
    assert made.built
    assert made.path.read_bytes() == b"two"
    assert cache.get(KEY, refuse).path.read_bytes() == b"one"
    # Of another graph nothing is near.
    assert list(made.instead_of) == ([] if part == "graph" else [f"{part}: {getattr(KEY, part)}, not {value}"])


def test_of_two_processes_one_builds_and_the_other_waits_for_it(tmp_path):
    first = builder(tmp_path, "first", 2)
    wait_for(tmp_path / "first.began")
    second = builder(tmp_path, "second", 0)
    assert first.communicate(timeout=60)[0].split() == ["first", "True"]
    assert second.communicate(timeout=60)[0].split() == ["first", "False"]
    assert (tmp_path / "second.waits").exists()
    assert not (tmp_path / "second.began").exists()


def test_a_killed_builder_leaves_nothing_that_looks_finished_and_holds_no_one_up(tmp_path):
    killed = builder(tmp_path, "killed", 60)
    wait_for(tmp_path / "killed.began")
    waiting = builder(tmp_path, "waiting", 0)
    wait_for(tmp_path / "waiting.waits")
    assert not list((tmp_path / "engines").glob("[!.]*/engine"))
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    killed.stdout.close()
    assert waiting.communicate(timeout=60)[0].split() == ["waiting", "True"]
    left = {p.name for p in (tmp_path / "engines").iterdir()}
    assert left == {KEY.digest, f"{KEY.digest}.lock"}  # and not what the killed one had begun


def test_a_failed_build_leaves_nothing_and_gives_the_lock_back(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise AccuQuantError("the compiler refused it")

    cache = EngineCache(tmp_path)
    with pytest.raises(AccuQuantError, match="the compiler refused it"):
        cache.get(KEY, fail)
    assert not list(cache.folder.glob("[!.]*/engine"))
    assert cache.get(KEY, written(b"engine")).built


@pytest.mark.parametrize("damage", ["engine", "key.json", "cut"])
def test_what_is_damaged_is_built_anew(tmp_path, damage):
    cache = EngineCache(tmp_path)
    place = cache.get(KEY, written(b"engine")).path.parent
    if damage == "cut":
        os.truncate(place / "engine", 3)
    else:
        (place / damage).write_text(json.dumps({"not": "ours"}))
    assert cache.get(KEY, written(b"engine")).built
    assert not cache.get(KEY, refuse).built


def test_patience_ends(tmp_path):
    slow = builder(tmp_path, "slow", 60)
    wait_for(tmp_path / "slow.began")
    with pytest.raises(AccuQuantError, match=r"another process has been building this engine for 0 s"):
        EngineCache(tmp_path).get(KEY, refuse, patience=0.1)
    slow.kill()
    slow.communicate()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AccuQuantError, match=r"engines cannot be kept in .*file/engines"):
        EngineCache(tmp_path / "file").get(KEY, refuse)
