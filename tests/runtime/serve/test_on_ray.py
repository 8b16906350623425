"""On Ray: workers change no byte, and a killed one costs no picture."""

import os
import signal
import sys

import numpy as np
import pytest
from accuquant.runtime import Pipeline, cli_sample
from accuquant.runtime.errors import AccuQuantError

ray = pytest.importorskip("ray", reason="Ray is not installed; it comes with accuquant[ray]")
pytest.importorskip("ray.data", reason="Ray Data is not installed; it comes with accuquant[ray]")
from accuquant.runtime.serve import on_ray  # noqa: E402

BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Four workers on this machine, or the cluster that RAY_ADDRESS names."""
    cores = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": 4}
    ray.init(**cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def here(bundle, seeds, **wishes):
    with Pipeline(bundle, batch=BATCH, threads=1) as pipeline:
        return pipeline.generate(seeds, **wishes)


def spread(bundle, workers, **wishes):
    opening = on_ray.Opening(bundle.folder, batch=BATCH)
    return np.concatenate(list(on_ray.sample(opening, wishes, workers, decoded=False)))


def test_one_worker_and_four_make_the_same_bytes(class_bundle):
    wishes = {
        "seeds": [*range(13), 2**64 - 1], "classes": [i % 4 for i in range(14)], "guidance": [2.0] * 13 + [1.0],
    }  # fmt: skip
    expected = here(class_bundle, **wishes)
    for workers in (1, 4):
        np.testing.assert_array_equal(spread(class_bundle, workers, **wishes), expected)


def test_a_killed_worker_costs_time_and_no_picture(tiny_bundle, tmp_path, monkeypatch):
    class Mortal(on_ray._Sampler):
        def __call__(self, jobs):
            if 5 in jobs["seeds"] and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(jobs)

    monkeypatch.setattr(on_ray, "_Sampler", Mortal)
    made = spread(tiny_bundle, 2, seeds=range(12))
    assert (tmp_path / "killed").exists()
    np.testing.assert_array_equal(made, here(tiny_bundle, range(12)))


def test_what_cannot_be_sampled_is_said_in_one_sentence(class_bundle):
    with pytest.raises(AccuQuantError, match="class 99 is out of range; the network knows 0 to 3"):
        spread(class_bundle, 1, seeds=[0, 1], classes=[0, 99])


def written(monkeypatch, out, bundle, *arguments):
    """What the command wrote of six pictures: files of a folder by name, or one file."""
    command = ["accuquant-sample", str(bundle.folder), "-n", "6", "--batch", "4", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        cli_sample.main()
    assert done.value.code == 0
    if out.is_file():
        return out.read_bytes()
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(files) == 6
    return files


def test_the_command_writes_the_same_files_on_workers(tiny_bundle, tmp_path, monkeypatch):
    here = written(monkeypatch, tmp_path / "here", tiny_bundle, "--threads", "1")
    assert written(monkeypatch, tmp_path / "ray", tiny_bundle, "--ray", "2") == here


def test_rows_of_a_file_are_taken_in_turn_on_workers_too(folder_bundle, tmp_path, monkeypatch):
    bundle = folder_bundle("pixart")
    asked = "--conditions", str(bundle.folder.parent / "rows.safetensors")
    here = written(monkeypatch, tmp_path / "here.npy", bundle, *asked, "--threads", "1")
    assert written(monkeypatch, tmp_path / "ray.npy", bundle, *asked, "--ray", "2") == here


def test_a_file_that_does_not_fit_is_refused_before_any_worker_starts(tiny_bundle, tmp_path, monkeypatch, capsys):
    command = ["accuquant-sample", str(tiny_bundle.folder), "--conditions", str(tmp_path / "rows"), "--ray", "2"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(on_ray, "map_chunks", None)
    with pytest.raises(SystemExit) as done:
        cli_sample.main()
    assert done.value.code == 1
    assert "the network takes no rows of a file" in " ".join(capsys.readouterr().err.split())
