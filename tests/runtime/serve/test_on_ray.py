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


def test_the_command_writes_the_same_files_on_workers(tiny_bundle, tmp_path, monkeypatch):
    for name, extra in (("here", ["--threads", "1"]), ("ray", ["--ray", "2"])):
        arguments = [str(tiny_bundle.folder), "-n", "6", "--batch", "4", "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["accuquant-sample", *arguments, *extra])
        with pytest.raises(SystemExit) as done:
            cli_sample.main()
        assert done.value.code == 0
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("here", "ray")}
    assert len(files["here"]) == 6
    assert files["here"] == files["ray"]
