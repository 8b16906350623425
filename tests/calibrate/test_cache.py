"""Teacher trajectories kept between runs: used again when nothing they depend on changed, within a budget."""

import os

import pytest
import torch
from accuquant.calibrate.cache import TrajectoryCache
from accuquant.calibrate.trajectory import Trajectory


def made(value: float, n: int = 2) -> Trajectory:
    return Trajectory(tuple(range(n)), torch.full((3, n, 1, 8, 8), value), torch.full((2, n, 1, 8, 8), -value))


class Teacher:
    def __init__(self, value: float = 1.0) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Trajectory:
        self.calls += 1
        return made(self.value)


def test_the_second_run_reads_what_the_first_computed(tmp_path):
    teacher = Teacher()
    for _ in range(3):
        got = TrajectoryCache(tmp_path, 1 << 20).get({"plan": 1, "seeds": [0, 2]}, teacher)
        assert torch.equal(got.states, made(1.0).states)
        assert torch.equal(got.outputs, made(1.0).outputs)
        assert got.seeds == (0, 1)
    assert teacher.calls == 1


def test_whatever_it_depends_on_names_another_file(tmp_path):
    cache, teacher = TrajectoryCache(tmp_path, 1 << 20), Teacher()
    for depends_on in ({"plan": 1}, {"plan": 2}, {"plan": 1, "torch": "x"}):
        cache.get(depends_on, teacher)
    assert teacher.calls == 3
    assert cache.path({"a": 1, "b": 2}) == cache.path({"b": 2, "a": 1})


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file at all"])
def test_a_damaged_file_is_computed_anew(tmp_path, damage):
    cache, teacher = TrajectoryCache(tmp_path, 1 << 20), Teacher()
    cache.get({}, teacher)
    cache.path({}).write_bytes(damage)
    assert torch.equal(cache.get({}, teacher).states, made(1.0).states)
    assert teacher.calls == 2
    cache.get({}, teacher)
    assert teacher.calls == 2


def test_the_files_unused_for_longest_make_room(tmp_path):
    cache = TrajectoryCache(tmp_path, 1 << 20)
    for age, key in enumerate(("c", "b", "a")):
        cache.get({"key": key}, Teacher())
        os.utime(cache.path({"key": key}), (1e9 - 1000 * age,) * 2)
    size = cache.path({"key": "a"}).stat().st_size
    cache.get({"key": "a"}, Teacher())  # used just now
    small = TrajectoryCache(tmp_path, 2 * size + size // 2)
    small.get({"key": "d"}, Teacher())
    assert {k for k in "abcd" if cache.path({"key": k}).exists()} == {"a", "d"}


def test_without_a_budget_nothing_is_written(tmp_path):
    teacher = Teacher()
    for _ in range(2):
        TrajectoryCache(tmp_path / "none", 0).get({}, teacher)
    assert teacher.calls == 2
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = TrajectoryCache(tmp_path / "file" / "folder", 1 << 20)
    assert torch.equal(cache.get({}, Teacher()).states, made(1.0).states)
