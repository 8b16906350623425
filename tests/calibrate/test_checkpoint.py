"""Files that are no checkpoints, or worse, get a sentence; nothing in them is ever run."""

import io
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from accuquant.calibrate.checkpoint import digest, name_of, read_checkpoint, stored_bytes
from accuquant.runtime.errors import AccuQuantError
from safetensors.torch import save_file

# Damaged files announce odd pickle protocols, of which torch warns before it fails.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

STATE = {"a.weight": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2)}


def as_bytes(stored, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_both_of_torchs_formats_are_read(tmp_path, suffix, zipped):
    path = tmp_path / f"m{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert all(torch.equal(read[k], STATE[k]) for k in STATE)


def test_safetensors_is_read(tmp_path):
    save_file(STATE, tmp_path / "m.safetensors")
    read = read_checkpoint(tmp_path / "m.safetensors")
    assert all(torch.equal(read[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_missing_file(tmp_path, name):
    with pytest.raises(AccuQuantError, match=f"{name} does not exist"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(AccuQuantError, match=f"{name} is empty"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(AccuQuantError, match=r"is a folder without model_index\.json"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_archive_cut_off(tmp_path, share):
    data = as_bytes({"w": torch.randn(64, 64)})
    (tmp_path / "m.ckpt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(AccuQuantError, match=r"m\.ckpt is cut off"):
        read_checkpoint(tmp_path / "m.ckpt")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_archive_cut_to_less_than_its_signature(tmp_path, length):
    (tmp_path / "m.ckpt").write_bytes(as_bytes(STATE)[:length])
    with pytest.raises(AccuQuantError, match=r"m\.ckpt"):
        read_checkpoint(tmp_path / "m.ckpt")


def test_legacy_file_cut_off_anywhere(tmp_path):
    data = as_bytes(STATE, _use_new_zipfile_serialization=False)
    for length in range(1, len(data) - 1, 7):
        (tmp_path / "m.ckpt").write_bytes(data[:length])
        with pytest.raises(AccuQuantError, match=r"m\.ckpt"):
            read_checkpoint(tmp_path / "m.ckpt")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_safetensors_cut_off(tmp_path, share):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(32, 32)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(AccuQuantError, match=r"m\.safetensors is not a readable safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_random_bytes(tmp_path, name):
    source = random.Random(0)
    for _ in range(100):
        (tmp_path / name).write_bytes(source.randbytes(source.randint(1, 300)))
        with pytest.raises(AccuQuantError, match=name):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_flipped_bytes_give_a_user_error_or_another_object_but_no_crash(tmp_path, zipped):
    data = as_bytes(STATE, _use_new_zipfile_serialization=zipped)
    source = random.Random(1)
    escaped = {}
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(source.randint(1, 8)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        (tmp_path / "m.ckpt").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "m.ckpt")
        except AccuQuantError:
            pass
        except Exception as error:
            escaped[type(error).__name__] = str(error)
    assert escaped == {}


@pytest.mark.parametrize("text", ["<html>404 Not Found</html>", "version https://git-lfs.github.com/spec/v1\noid x\n"])
@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_a_failed_download(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(AccuQuantError, match=name):
        read_checkpoint(tmp_path / name)


class Malicious:
    """Unpickled without care, this creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_file_that_wants_to_run_code_is_refused_and_does_not(tmp_path, form):
    sentinel = tmp_path / "sentinel"
    data = as_bytes({**STATE, "payload": Malicious(sentinel)}, _use_new_zipfile_serialization=form == "zip")
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(AccuQuantError, match="asks for code to be run"):
        read_checkpoint(tmp_path / "m.ckpt")
    assert not sentinel.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_that_wants_to_run_code_does_not_either(tmp_path, protocol):
    sentinel = tmp_path / "sentinel"
    data = pickle.dumps(Malicious(sentinel), protocol)
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(AccuQuantError, match=r"m\.ckpt"):
        read_checkpoint(tmp_path / "m.ckpt")
    assert not sentinel.exists()
    pickle.loads(data)  # the sentinel works: the careless way does create it
    assert sentinel.exists()


@pytest.mark.parametrize(
    "data",
    [b"random bytes", pickle.dumps({"a": 1}), pickle.dumps(os.getcwd)],
    ids=["bytes", "plain pickle", "function"],
)
def test_no_message_advises_to_switch_the_safety_off(tmp_path, data):
    """torch's own text does, at length; a user of this tool has no such switch."""
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(AccuQuantError) as caught:
        read_checkpoint(tmp_path / "m.ckpt")
    assert "weights_only" not in str(caught.value)


def test_a_pickled_module_is_refused_with_the_way_out(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(AccuQuantError, match="save its state dict alone"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save(STATE, path)
    path.chmod(0)
    with pytest.raises(AccuQuantError):
        read_checkpoint(path)


def test_safetensors_under_another_name_is_refused_not_misread(tmp_path):
    save_file(STATE, tmp_path / "m.ckpt")
    with pytest.raises(AccuQuantError, match=r"m\.ckpt"):
        read_checkpoint(tmp_path / "m.ckpt")


def test_a_folders_digest_is_of_names_settings_and_weights_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("one")
    first = digest(tmp_path)
    (tmp_path / "README.md").write_text("two")
    assert digest(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest(tmp_path) != first
    assert stored_bytes(tmp_path) == 2
    assert name_of(tmp_path / "b" / "..") == tmp_path.name
