"""Teacher trajectories on Ray: the bytes of this process, however many workers there are and whoever of them dies."""

import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from accuquant.calibrate.cache import TrajectoryCache
from accuquant.calibrate.families import load_model
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export import build as building
from accuquant.export.build import prepare
from accuquant.export.request import Request
from accuquant.runtime.errors import AccuQuantError

N, BATCH = 14, 4


def test_without_ray_it_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("calibrate.teacher_on_ray", "runtime.spread"):
        monkeypatch.delitem(sys.modules, f"accuquant.{name}", raising=False)
    scheme, spec = QuantScheme(weight_bits=8, activation_bits=8), CalibrationSpec(**PRESETS["smoke"])
    request = Request(checkpoint=tmp_path / "absent.ckpt", out=tmp_path / "out", scheme=scheme, spec=spec, ray=2)
    with pytest.raises(AccuQuantError, match=r"pip install 'accuquant\[ray\]'"):
        prepare(request)


@pytest.fixture(scope="module")
def workers():
    """Four on this machine, or the cluster that RAY_ADDRESS names; the module whose work they do."""
    ray = pytest.importorskip("ray", reason="Ray is not installed; it comes with accuquant[ray]")
    pytest.importorskip("ray.data", reason="Ray Data is not installed; it comes with accuquant[ray]")
    from accuquant.calibrate import teacher_on_ray

    cores = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": 4 * torch.get_num_threads()}
    ray.init(**cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield teacher_on_ray
    ray.shutdown()


@pytest.fixture(scope="module")
def guided(tiny, tmp_path_factory):
    """Arguments of `simulate`: a guided network of classes, whose seeds have one each."""
    model = load_model(tiny.save_class_checkpoint(tmp_path_factory.mktemp("classes"), 4))
    return (
        model.guided(2.5),
        trace("ddim", model.noise_schedule, 4),
        range(N),
        model.sample_shape,
        model.condition(range(N)),
    )


def same(a, b):
    assert a.seeds == b.seeds
    assert a.condition.keys() == b.condition.keys()
    for one, other in [
        (a.states, b.states),
        (a.outputs, b.outputs),
        *((a.condition[k], b.condition[k]) for k in a.condition),
    ]:
        assert one.is_contiguous()
        assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 4])
def test_no_worker_and_any_number_make_the_same_bytes(workers, guided, count):
    seen = []
    run = workers.simulate_on_ray(
        *guided, workers=count, batch=BATCH, progress=lambda done, total: seen.append((done, total))
    )
    same(run, simulate(*guided, batch=BATCH))
    assert seen == [(4, N), (8, N), (12, N), (14, N)]


def test_a_killed_worker_costs_time_and_no_byte(workers, guided, tmp_path, monkeypatch):
    class Mortal(workers._Teacher):
        def __call__(self, chunk):
            if 5 in chunk["seeds"] and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(chunk)

    monkeypatch.setattr(workers, "_Teacher", Mortal)
    run = workers.simulate_on_ray(*guided, workers=2, batch=BATCH)
    assert (tmp_path / "killed").exists()
    same(run, simulate(*guided, batch=BATCH))


def test_an_export_keeps_the_same_trajectories(workers, tiny, tmp_path):
    """With operators that are to be quantized in the network, as it travels."""
    request = Request(
        checkpoint=tiny.save_checkpoint(tmp_path, tiny.unet()), out=tmp_path / "out",
        scheme=QuantScheme(weight_bits=4, activation_bits=8), steps=3,
        spec=CalibrationSpec(**PRESETS["smoke"] | {"trajectories": 18, "held_out": 3}),
    )  # fmt: skip
    kept = []
    for count in (0, 2):
        asked = replace(request, ray=count, cache=TrajectoryCache(tmp_path / f"cache-{count}", 1 << 30))
        building._trajectories(
            asked, prepare(asked), tmp_path / "work", {"checkpoint": "", "plan": ""}, lambda *_: None
        )
        kept.append({path.name: path.read_bytes() for path in asked.cache.folder.iterdir()})
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]
