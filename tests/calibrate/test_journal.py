"""Snapshots: what is read is what was written, or a sentence says why not."""

import pytest
import torch
from accuquant.calibrate.journal import Journal, Snapshot, pack_optimizer, unpack_optimizer
from accuquant.runtime.errors import AccuQuantError
from safetensors.torch import save_file

SPEC = {"spec": {"group": 5, "iterations": 10}, "plan": [1, 2, (3, 4)], "checkpoint": "abc"}


def snapshot() -> Snapshot:
    tensors = {"now/scale/0": torch.tensor(0.1), "best/choice/1": torch.randn(3, 4).T, "n": torch.tensor([2**40, -1])}
    return Snapshot(7, tensors, {"held_out": {"0": 0.1, "5": 1e-30}, "kept": 5, "norm": 0.1 + 0.2})


def test_round_trip_is_exact(tmp_path):
    written = snapshot()
    Journal(tmp_path, SPEC).write(written)
    read = Journal(tmp_path, SPEC).read()
    assert (read.iteration, read.record) == (7, written.record)
    assert read.tensors.keys() == written.tensors.keys()
    for name, value in written.tensors.items():
        assert torch.equal(read.tensors[name], value)
        assert read.tensors[name].dtype == value.dtype


def test_no_snapshot_is_none(tmp_path):
    assert Journal(tmp_path / "nowhere", SPEC).read() is None


def test_a_later_snapshot_replaces_the_earlier(tmp_path):
    journal = Journal(tmp_path, SPEC)
    journal.write(snapshot())
    journal.write(Snapshot(8, {"x": torch.ones(1)}, {}))
    assert journal.read().iteration == 8
    assert [p.name for p in tmp_path.iterdir()] == [journal.path.name]


def test_a_failed_write_leaves_the_earlier_snapshot(tmp_path):
    journal = Journal(tmp_path, SPEC)
    journal.write(snapshot())
    with pytest.raises((TypeError, ValueError)):
        journal.write(Snapshot(8, {}, {"not json": object()}))
    assert journal.read().iteration == 7


@pytest.mark.parametrize(
    ("change", "key", "unchanged"),
    [
        ({"checkpoint": "def"}, "checkpoint", "plan"),
        ({"spec": {"group": 4, "iterations": 10}}, "spec", "checkpoint"),
        ({"new": 1}, "new", "checkpoint"),
    ],
)
def test_another_specification_is_refused_naming_what_differs(tmp_path, change, key, unchanged):
    Journal(tmp_path, SPEC).write(snapshot())
    with pytest.raises(AccuQuantError, match=f"another run.*{key}") as caught:
        Journal(tmp_path, {**SPEC, **change}).read()
    assert f"{unchanged}:" not in str(caught.value)


def test_a_missing_key_differs_too(tmp_path):
    Journal(tmp_path, SPEC).write(snapshot())
    with pytest.raises(AccuQuantError, match="checkpoint"):
        Journal(tmp_path, {k: v for k, v in SPEC.items() if k != "checkpoint"}).read()


def test_the_order_of_keys_is_no_difference(tmp_path):
    Journal(tmp_path, SPEC).write(snapshot())
    assert Journal(tmp_path, dict(reversed(SPEC.items()))).read().iteration == 7


@pytest.mark.parametrize("cut", [0, 1, 9, 200, -1])
def test_a_damaged_file_is_a_user_error(tmp_path, cut):
    journal = Journal(tmp_path, SPEC)
    journal.write(snapshot())
    journal.path.write_bytes(journal.path.read_bytes()[:cut])
    with pytest.raises(AccuQuantError, match=r"snapshot.*damaged.*--resume"):
        journal.read()


@pytest.mark.parametrize("meta", [None, {"iteration": "3"}, {"specification": "{", "iteration": "3", "record": "{}"}])
def test_a_foreign_safetensors_file_is_a_user_error(tmp_path, meta):
    journal = Journal(tmp_path, SPEC)
    save_file({"x": torch.ones(2)}, journal.path, meta)
    with pytest.raises(AccuQuantError, match="snapshot"):
        journal.read()


def test_optimizer_continues_as_if_never_stopped():
    def run(interrupt: bool) -> torch.Tensor:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        q = torch.nn.Parameter(torch.ones(()))
        unused = torch.nn.Parameter(torch.ones(2))

        def make():
            groups = [{"params": [p, unused], "lr": 0.1}, {"params": [q], "lr": 0.01}]
            return torch.optim.Adam(groups, betas=(0.9, 0.99))

        optimizer = make()
        for i in range(10):
            if interrupt and i == 6:
                packed = {k: v.clone() for k, v in pack_optimizer(optimizer).items()}
                optimizer = make()
                unpack_optimizer(optimizer, packed | {"now/other": torch.zeros(1)})
            optimizer.zero_grad()
            ((p * q).square().sum() + (p * i).sum()).backward()
            optimizer.step()
        return torch.cat([p.detach(), q.detach()[None]])

    assert torch.equal(run(False), run(True))
