"""Files and folders appear whole or not at all."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import atomic, atomic_folder, cache_folder, sha256, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    """Renaming into place fails as on a full disk."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)


def test_written_whole_with_nothing_beside_it(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "text")
    write_bytes(tmp_path / "deep" / "b.bin", b"\x00\xff")
    assert (tmp_path / "deep" / "a.txt").read_text() == "text"
    assert (tmp_path / "deep" / "b.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "deep") == ["a.txt", "b.bin"]


def test_the_target_is_not_there_before_the_end(tmp_path):
    target = tmp_path / "a.txt"
    with atomic(target) as part:
        part.write_text("half")
        assert not target.exists()
        assert part.parent == tmp_path  # the same disk, so that the rename is atomic
    assert target.read_text() == "half"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write():
        with atomic(target) as part:
            part.write_text("new, but only ha")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_full_disk_on_rename(tmp_path, full_disk):
    with pytest.raises(AccuQuantError, match=r"a\.txt: No space left on device .*MiB free"):
        write_text(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


def test_full_disk_while_writing(tmp_path):
    def write():
        with atomic(tmp_path / "a.txt") as part:
            part.write_text("ha")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(AccuQuantError, match="No space left"):
        write()
    assert names(tmp_path) == []


def test_full_disk_on_flush(tmp_path, monkeypatch):
    """Filesystems that allocate late report a full disk only at fsync."""

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(AccuQuantError, match="No space left"):
        write_text(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AccuQuantError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "text")
    with pytest.raises(AccuQuantError, match="cannot write"), atomic_folder(tmp_path / "file" / "bundle"):
        pass


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "bundle"
    with atomic_folder(target) as part:
        (part / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["bundle"]


def test_folder_replaces_an_older_one_completely(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("")
    with atomic_folder(target) as part:
        (part / "new").write_text("")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_folder_leaves_the_older_one(tmp_path, error):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("")

    def write():
        with atomic_folder(target) as part:
            (part / "new").write_text("")
            raise error

    with pytest.raises(error):
        write()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["bundle"]


def test_folder_on_a_full_disk(tmp_path, full_disk):
    with pytest.raises(AccuQuantError, match="No space left"), atomic_folder(tmp_path / "bundle") as part:
        (part / "a").write_text("1")
    assert names(tmp_path) == []


def test_older_folder_survives_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    """The old folder has been moved aside and the second rename fails: it must come back, not be lost."""
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("")
    real = os.replace

    def refuse_the_new(source, destination):
        if Path(destination) == target and str(source).endswith(".part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, destination)

    monkeypatch.setattr(os, "replace", refuse_the_new)
    with pytest.raises(AccuQuantError, match="No space left"), atomic_folder(target) as part:
        (part / "new").write_text("")
    assert names(tmp_path) == ["bundle"]
    assert names(target) == ["old"]


def test_what_a_killed_process_left_does_not_stand_in_the_way(tmp_path):
    """Inside a container the process number repeats, so the temporary name does too."""
    left = tmp_path / f".bundle.{os.getpid()}.part"
    left.mkdir()
    (left / "stale").write_text("")
    with atomic_folder(tmp_path / "bundle") as part:
        (part / "new").write_text("")
    assert names(tmp_path / "bundle") == ["new"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "bundle").write_text("precious")
    with pytest.raises(AccuQuantError, match="not a folder"), atomic_folder(tmp_path / "bundle"):
        pass
    assert (tmp_path / "bundle").read_text() == "precious"


def test_digest_of_a_file_larger_than_one_piece(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCUQUANT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ACCUQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "accuquant"
