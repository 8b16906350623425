"""Checkpoints read by a machine of our own: what it makes equals torch's, and nothing runs, whatever a file asks."""

import io
import pickle
import random
import struct
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accuquant.calibrate import archive, rebuild, unpickle
from accuquant.calibrate.checkpoint import read_checkpoint
from accuquant.calibrate.families import FAMILIES, load_model
from accuquant.calibrate.unpickle import Foreign
from accuquant.runtime.errors import AccuQuantError

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tools" / "reference" / "fashion-ddim.ckpt"
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stacked"])


@pytest.fixture(scope="module", autouse=True)
def _tools():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        yield


@pytest.fixture(scope="module")
def fuzz():
    """Seeds, attacks and mutations of the fuzzer in tools/."""
    import mutate_checkpoints

    return mutate_checkpoints


@pytest.fixture(scope="module")
def watch(fuzz, tmp_path_factory):
    """Reads bytes as a checkpoint, under audit hooks and traps that tell whether anything ran."""
    from fuzz_checkpoints import Watch

    folder = tmp_path_factory.mktemp("watched")
    watching = Watch(folder / "m.ckpt", folder / "mark")
    for seed in fuzz.seeds().values():  # what torch imports at its first use is not the file's doing
        assert watching.examine(seed) == "read"
    watching.executions()
    return watching


def read(tmp_path, data: bytes):
    (tmp_path / "m.ckpt").write_bytes(data)
    return read_checkpoint(tmp_path / "m.ckpt")


def archived(pickled: bytes, **records: bytes) -> bytes:
    """A sound archive around any pickle, with the storage "0" unless others are given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("a/data.pkl", pickled)
        for key, content in (records or {"0": bytes(64)}).items():
            opened.writestr(f"a/data/{key}", content)
    return buffer.getvalue()


def tensor(size="K\x04", stride="K\x01", offset="K\0", count="K\x10", kind="Float", key="0") -> bytes:
    """The pickle of one tensor, its numbers as opcodes; the storage has 16 floats."""
    named = b"(X\7\0\0\0storagectorch\n%bStorage\nX%bX\3\0\0\0cpu" % (
        kind.encode(),
        struct.pack("<I", len(key)) + key.encode(),
    )
    rest = b"tQ%b(%bt(%bt\x89Nt" % tuple(part.encode("latin-1") for part in (offset, size, stride))
    return b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(" + named + count.encode("latin-1") + rest + b"R."


def number(value: int) -> str:
    return "\x8a\x09" + value.to_bytes(9, "little", signed=True).decode("latin-1")


def content(tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def same(ours, theirs) -> None:
    """Equal in type, order and every bit, and laid out alike."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert (ours.storage_offset(), ours.requires_grad) == (theirs.storage_offset(), theirs.requires_grad)
        assert content(ours) == content(theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == theirs


# ------------------------------------------------------------------------------------------------ agreement with torch


def test_the_reference_checkpoint_bit_for_bit():
    same(read_checkpoint(REFERENCE), torch.load(REFERENCE, weights_only=True))


@FORMS
@pytest.mark.parametrize(
    "name",
    sorted(name.removeprefix("torch.") for name in rebuild.DTYPES),
)
def test_every_type_bit_for_bit(tmp_path, name, zipped):
    path = tmp_path / "m.pt"
    values = torch.randint(0, 2 if name == "bool" else 100, (3, 5)).to(getattr(torch, name))
    stored = {"a": values, "view": values.t()[1:, 1:], "empty": values[:0]}
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    # torch writes its newest types into the stacked format too, and cannot read them there.
    readable = zipped or not name.startswith(("uint16", "uint32", "uint64", "float8"))
    same(read_checkpoint(path), torch.load(path, weights_only=True) if readable else stored)


@FORMS
def test_views_parameters_and_nesting(tmp_path, zipped):
    base = torch.arange(24.0).reshape(4, 6)
    named = torch.nn.Parameter(torch.ones(3))
    named.note = "an attribute, which torch keeps and weights do not need"
    stored = {
        "whole": base,
        "row": base[2],
        "transposed": base.t()[1:, ::2],
        "expanded": torch.ones(2, 1).expand(2, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(3, 0, 2),
        "parameter": torch.nn.Parameter(base),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True),
        "state": OrderedDict(torch.nn.BatchNorm1d(2).state_dict()),
        "nested": [
            {"a": (1, -2.5, None, True, ["x", ()])},
            {3, 4},
            torch.Size((1, 2)),
            2**70,
            -(2**40),
        ],
        3: "a number as key",
        "counted": Counter(a=2),
    }
    path = tmp_path / "m.pt"
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    ours, theirs = read_checkpoint(path), torch.load(path, weights_only=True)
    assert dict(ours.pop("counted")) == dict(theirs.pop("counted"))  # a plain dict is enough of a Counter
    same(ours, theirs)
    assert ours["row"].untyped_storage().data_ptr() == ours["whole"].untyped_storage().data_ptr()
    torch.save({"p": named}, path, _use_new_zipfile_serialization=zipped)
    same(read_checkpoint(path)["p"].data, named.data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_protocols(tmp_path, protocol):
    stored = {
        "w": torch.randn(3, 2),
        "d": defaultdict(list, a=[1]),
        "s": {1, 2},
        "deep": [[[[(1,)]]]],
        "text": "ü" * 300,
    }
    torch.save(stored, tmp_path / "m.pt", pickle_protocol=protocol)
    ours = read_checkpoint(tmp_path / "m.pt")
    assert torch.equal(ours.pop("w"), stored.pop("w"))
    assert ours == stored


def test_both_byte_orders(tmp_path):
    stored = {name: torch.arange(5).to(getattr(torch, name)) for name in ("float32", "int16", "complex64", "uint8")}
    data = zipfile.ZipFile(io.BytesIO(to_bytes(stored)))
    swapped = {}
    for entry in data.infolist():
        swapped[entry.filename] = data.read(entry)
    for key, width in zip("0123", (4, 2, 4, 1), strict=True):
        content = swapped[f"archive/data/{key}"]
        swapped[f"archive/data/{key}"] = b"".join(content[i : i + width][::-1] for i in range(0, len(content), width))
    swapped["archive/byteorder"] = b"big"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in swapped.items():
            opened.writestr(name, content)
    ours = read(tmp_path, buffer.getvalue())
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_records_of_any_alignment_give_aligned_tensors(tmp_path):
    for shift in range(1, 9):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as opened:
            opened.writestr("a/data.pkl", tensor())
            opened.writestr("a/" + "x" * shift, b"")
            opened.writestr("a/data/0", struct.pack("<16f", *range(16)))
        ours = read(tmp_path, buffer.getvalue())
        assert torch.equal(ours, torch.arange(4.0))
        assert ours.data_ptr() % 64 == 0


def test_the_file_is_mapped_not_read_and_never_written(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(2**22)}, path)  # 16 MiB
    before = path.read_bytes()
    tracemalloc.start()
    ours = read_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    ours["w"].add_(1)
    assert path.read_bytes() == before


def test_without_checksums_as_torch_can_write(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "m.pt")["w"], torch.ones(3))


def to_bytes(stored, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored, buffer, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ foreign classes


@FORMS
def test_what_a_training_framework_leaves_is_read_around(tmp_path, fuzz, zipped):
    data = fuzz.lightning(_use_new_zipfile_serialization=zipped)
    assert not [name for name in sys.modules if name.startswith(("pytorch_lightning", "omegaconf"))]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(data), weights_only=True)
    stored = read(tmp_path, data)
    torch.manual_seed(0)
    assert stored["epoch"] == 4
    assert [f"model.diffusion_model.{i}.weight" for i in range(4)] == list(stored["state_dict"])
    assert all(value.shape == (3, 4) and value.std() > 0 for value in stored["state_dict"].values())
    assert torch.equal(stored["optimizer_states"][0]["state"][0]["exp_avg_sq"], torch.ones(3, 4))
    ((callback, remembered),) = stored["callbacks"].items()
    assert repr(callback) == "<pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint, not read>"
    assert remembered["best_model_path"] == "a/b.ckpt"
    assert isinstance(stored["hyper_parameters"], Foreign)
    assert not [name for name in sys.modules if name.startswith(("pytorch_lightning", "omegaconf"))]


def test_a_family_recognises_weights_beside_foreign_objects(tiny_checkpoint, fuzz):
    state = torch.load(tiny_checkpoint, weights_only=True)
    modules = fuzz.framework_modules()
    sys.modules.update(modules)
    try:
        callback = modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
        torch.save([state, callback(a=1), {callback: 2}, 5, {**state, "note": callback()}], tiny_checkpoint)
    finally:
        for name in modules:
            del sys.modules[name]
    assert load_model(tiny_checkpoint).family == "ddim"


def test_foreign_objects_are_nothing_to_a_family():
    stub = Foreign("a.b")
    for stored in (stub, {"conv_in.weight": stub}, [stub] * 5, {stub: stub}):
        assert [family.recognise(stored) for family in FAMILIES] == [None] * len(FAMILIES)


def test_where_there_are_no_weights_the_user_hears_of_pickled_objects(tmp_path):
    torch.save({"epoch": 3, "model": torch.nn.Linear(2, 2)}, tmp_path / "m.pt")
    with pytest.raises(AccuQuantError, match=r"epoch, model: a pickled torch\.nn\.modules\.linear\.Linear, not read"):
        load_model(tmp_path / "m.pt")


def test_names_in_messages_cannot_steer_a_terminal(tmp_path):
    with pytest.raises(AccuQuantError) as caught:
        read(tmp_path, archived(b"\x80\4\x8c\x05\x1b[31m\x8c\x02\x1b]\x93)R."))
    assert str(caught.value).isprintable()
    torch.save({"\x1b[31m": 1}, tmp_path / "n.pt")
    with pytest.raises(AccuQuantError) as caught:
        load_model(tmp_path / "n.pt")
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------------ hostile files


def test_the_traps_work(fuzz, watch):
    """Else the tests below could not fail: the careless reader of the standard library steps on most of them."""
    sprung = 0
    for attack in fuzz.attacks(watch.mark):
        if any(word in attack for word in (b"torch", b"\x8d", b"B\xff", b"\x96", b"r\xff", b"bytearray", b"Popen")):
            continue
        watch.on = True
        try:
            pickle.loads(b"\x80\4" + attack + b".")
        except Exception:
            pass
        finally:
            watch.on = False
        sprung += bool([what for what in watch.executions() if not what.startswith("pickle.find_class")])
    assert sprung >= 15


@pytest.mark.parametrize("where", ["alone", "beside weights", "as a key", "stacked"])
def test_nothing_that_a_file_calls_is_called(fuzz, watch, where):
    for attack in fuzz.attacks(watch.mark):
        if where == "stacked":
            head = to_bytes({}, _use_new_zipfile_serialization=False)
            data = head.replace(b"\x80\x02}q\x00.", b"\x80\x02" + attack + b".", 1)
            assert data != head
        else:
            around = {"alone": b"%b.", "beside weights": b"}X\1\0\0\0a%bs.", "as a key": b"}%bNs."}[where]
            data = archived(b"\x80\2" + around.replace(b"%b", attack))
        outcome = watch.examine(data)
        assert watch.executions() == []
        assert outcome == "read" or outcome.startswith("refused"), (attack, outcome)
        commands = (b"os\nsystem", b"eval", b"exec\n", b"Popen", b"torch\nload")
        if where == "alone" and any(command in attack for command in commands):
            assert outcome == "refused: asks for code to be run"


def test_a_name_that_runs_commands_is_told(tmp_path, fuzz):
    for name in (
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "builtins.eval",
        "__builtin__.exec",
        "torch.hub.load",
    ):
        shown = name.replace("__builtin__", "builtins")
        with pytest.raises(AccuQuantError, match=rf"asks for code to be run while loading \({shown}\)"):
            read(tmp_path, archived(b"\x80\2" + fuzz.call(name) + b"."))


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (tensor(size=number(17)), "larger than its storage"),
        (tensor(size=number(2**62)), "larger than its storage"),
        (tensor(size=number(2**62), stride=number(2**62)), "larger than its storage"),
        (tensor(size=number(2**63)), "shape is none"),
        (tensor(size=number(-1)), "shape is none"),
        (tensor(stride=number(-1)), "shape is none"),
        (tensor(stride=number(2**62)), "larger than its storage"),
        (tensor(offset=number(13)), "larger than its storage"),
        (tensor(offset=number(-4)), "shape is none"),
        (tensor(offset=number(2**63 - 1)), "larger than its storage"),
        (tensor(size="K\x02K\x02"), "shape is none"),
        (tensor(size="K\x01" * 65, stride="K\x01" * 65), "shape is none"),
        (tensor(size=number(2**40), stride="K\0"), "16 times its size"),
        (tensor(size=number(2**40) + number(2**40), stride="K\0K\0"), "16 times its size"),
        (tensor(size="G?\xf0\0\0\0\0\0\0"), "shape is none"),
        (tensor(size="\x88"), "shape is none"),
        (tensor(count=number(17)), "more bytes than there are"),
        (tensor(count=number(-1)), "no storage"),
        (tensor(count=number(2**62)), "more bytes than there are"),
        (tensor(kind="Double"), "more bytes than there are"),
        (tensor(kind="Q8"), "no storage"),
        (tensor(key="1"), "storage is missing"),
        (tensor(key="/"), "storage is missing"),
    ],
)
def test_tensors_that_claim_more_than_there_is(tmp_path, pickled, words):
    with pytest.raises(AccuQuantError, match=words):
        read(tmp_path, archived(pickled))


def test_tensors_to_the_last_element_are_read(tmp_path):
    """The bound is not off by one: all 16 elements, and the last alone."""
    values = struct.pack("<16f", *range(16))
    assert torch.equal(read(tmp_path, archived(tensor(size="K\x10"), **{"0": values})), torch.arange(16.0))
    assert read(tmp_path, archived(tensor(size="K\x01", offset="K\x0f"), **{"0": values})).item() == 15
    assert read(tmp_path, archived(tensor(size="K\x00" + number(2**40), stride="K\1K\1"))).shape == (0, 2**40)


def test_truth_values_that_would_break_kernels(tmp_path):
    with pytest.raises(AccuQuantError, match="neither 0 nor 1"):
        read(tmp_path, archived(tensor(kind="Bool"), **{"0": bytes([1, 0, 2, 255] * 4)}))


BOMBS = {
    "doubling tuples": b")" + b"2\x86" * 10_000 + b".",
    "doubling tuples as a key": b"})" + b"2\x86" * 200 + b"Ns.",
    "keys of one hash": b"}("
    + b"".join(b"(" + b"".join((b"J\xff\xff\xff\xff", b"J\xfe\xff\xff\xff")[n >> k & 1] for k in range(14)) + b"tN"
               for n in range(2**11)) + b"u.",
    "deep lists": b"(" * 20_000 + b"l" * 20_000 + b".",
    "deep tuples": b")" + b"\x85" * 45_000 + b".",
    "many steps": b"(" + b"\x8f" * 100_000 + b"l.",
    "copies of a list": b"c__builtin__\nset\nq\0]q\1(" + b"K\1" * 1000 + b"e(" + b"h\0h\1\x85R" * 1000 + b"l.",
    "a far memo": b"Nr\xff\xff\xff\xff.",
    "a long integer": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\1.",
    "a long text": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a large bytearray": b"\x96" + struct.pack("<Q", 2**62) + b"a.",
    "a decimal without end": b"L" + b"9" * 100_000 + b"L\n.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_of_structure(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(unpickle, "MOST_STEPS", 50_000)  # a twentieth, for a test's patience
    tracemalloc.start()
    try:
        with suppress(AccuQuantError):
            read(tmp_path, archived(BOMBS[bomb]))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30 * 2**20


@pytest.mark.parametrize("bomb", ["many steps", "copies of a list", "a long integer", "a decimal without end"])
def test_bombs_that_must_be_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(unpickle, "MOST_STEPS", 50_000)
    with pytest.raises(AccuQuantError, match="damaged"):
        read(tmp_path, archived(BOMBS[bomb]))


def written(entries, **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as opened:
        for name, content in entries:
            opened.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_play_tricks(tmp_path, monkeypatch):
    sound = [("a/data.pkl", tensor()), ("a/data/0", bytes(64))]
    cases = [
        (written(sound, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (
            written([*sound, ("a/data/1", bytes(2**22))], compression=zipfile.ZIP_DEFLATED),
            "compressed or encrypted",
        ),
        (written([*sound, sound[1]]), "two records of one name"),
        (written([*sound, ("b/data.pkl", b"N.")]), "2 records named data.pkl"),
        (written(sound[1:]), "0 records named data.pkl"),
        (written([("../../a/data.pkl", b"N."), sound[1]]), "0 records named data.pkl"),
        (written([("/data.pkl", tensor(key="/../../../etc/hostname")), sound[1]]), "storage is missing"),
        (written([*sound, ("a/byteorder", b"middle")]), "unknown byte order"),
    ]
    for data, words in cases:
        with pytest.raises(AccuQuantError, match=words):
            read(tmp_path, data)
    monkeypatch.setattr(archive, "LARGEST_PICKLE", 10)
    with pytest.raises(AccuQuantError, match="a pickle of"):
        read(tmp_path, written(sound))
    monkeypatch.setattr(archive, "LARGEST_DIRECTORY", 70)
    with pytest.raises(AccuQuantError, match="a directory of"):
        read(tmp_path, written(sound))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.ckpt"]


def test_records_that_lie_over_each_other(tmp_path):
    """A thousand entries of the directory for the same bytes: small on disk, large if each were copied."""
    data = written([("a/data.pkl", b"N."), ("a/data/0", bytes(4096)), *((f"a/data/{n}", b"") for n in range(1, 1000))])
    place = data.rfind(b"a/data/0", 0) - 46
    original = data[place : place + 46]
    changed = bytearray(data)
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        if data[at + 46 : at + 53] == b"a/data/":
            changed[at + 16 : at + 28] = original[16:28]
            changed[at + 42 : at + 46] = original[42:46]
        at = data.find(b"PK\x01\x02", at + 1)
    with pytest.raises(AccuQuantError, match="lie over each other"):
        read(tmp_path, bytes(changed))


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    data = bytearray(to_bytes({"w": torch.ones(1000)}))
    data[data.find(torch.ones(4).numpy().tobytes()) + 1234] ^= 4
    with pytest.raises(AccuQuantError, match="checksum"):
        read(tmp_path, bytes(data))


@FORMS
def test_cut_off_anywhere(tmp_path, fuzz, watch, zipped):
    data = fuzz.lightning(_use_new_zipfile_serialization=zipped)
    step = max(1, len(data) // 400)
    for length in range(1, len(data), step):
        outcome = watch.examine(data[:length])
        assert outcome.startswith("refused"), (length, outcome)
    assert watch.executions() == []


def test_mutated_files_run_nothing_and_end_in_words(fuzz, watch):
    """A small part of what tools/fuzz_checkpoints.py does, always the same."""
    outcomes = Counter()
    for shape, seed in fuzz.seeds().items():
        for n in range(300):
            outcome = watch.examine(fuzz.mutated(shape, seed, random.Random(f"test {shape} {n}"), watch.mark))
            assert watch.executions() == [], (shape, n)
            assert not outcome.startswith("escaped"), (shape, n, outcome)
            outcomes[outcome] += 1
    # Mutations that all died at the door would show nothing.
    assert outcomes["read"] > 150
    assert len(outcomes) > 30
