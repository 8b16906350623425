"""Checkpoint files of several shapes, attacks, and mutations of them by what knows their formats.

Seeds are state dicts in the zip and in the stacked format, every type of tensor, what a training framework leaves
behind. Opcodes of the pickle are dropped, repeated, exchanged or spliced with calls of `os.system` and its like;
numbers become huge or negative; records are renamed, cut, doubled, deflated; fields of the archive's directory are
overwritten. Where an attack works, it leaves a mark or steps on a trap.
"""

import io
import pickletools
import random
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

EXTREMES = (
    0,
    1,
    2,
    7,
    255,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    -1,
    -2,
    -(2**31),
    -(2**63),
)
WORDS = (b"..", b"/etc/passwd", b"../../x", b"data.pkl", b"byteorder", b"a" * 300, b"\0", b"C:\\x")
# ---------------------------------------------------------------------------------------------- seeds


def framework_modules() -> dict[str, types.ModuleType]:
    """Modules of a training framework, as far as pickling needs them; in sys.modules only while a seed is made."""
    modules = {}
    for path in ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "omegaconf.dictconfig.DictConfig"):
        parts = path.split(".")
        for n in range(1, len(parts)):
            modules.setdefault(".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
        name = parts[-1]
        setattr(modules[".".join(parts[:-1])], name, type(name, (dict,), {"__module__": ".".join(parts[:-1])}))
    return modules


def saved(stored: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored, buffer, **options)
    return buffer.getvalue()


def lightning(**options: Any) -> bytes:
    """What a Lightning trainer of Stable Diffusion's time wrote: weights among objects of its own classes."""
    modules = framework_modules()
    sys.modules.update(modules)
    try:
        callback = modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
        config = modules["omegaconf.dictconfig"].DictConfig(base_learning_rate=1e-4)
        config.__dict__["_metadata"] = {"ref_type": int}
        state = OrderedDict((f"model.diffusion_model.{i}.weight", torch.randn(3, 4)) for i in range(4))
        moments = {"step": 7, "exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.ones(3, 4)}
        return saved(
            {
                "epoch": 4,
                "state_dict": state,
                "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "best_model_path": "a/b.ckpt"}},
                "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
                "hyper_parameters": config,
                "numpy": torch.ones(1).numpy()[0],
            },
            **options,
        )
    finally:
        for name in modules:
            del sys.modules[name]


def many_types() -> dict[str, Any]:
    """Every type of storage, and views, shared storages, parameters, empty and expanded tensors."""
    names = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 float8_e5m2"
    base = torch.arange(24.0).reshape(4, 6)
    return {
        **{name: torch.ones(3).to(getattr(torch, name)) for name in names.split()},
        "view": base.t()[1:, ::2],
        "row": base[2],
        "expanded": torch.ones(2, 1).expand(2, 5),
        "parameter": torch.nn.Parameter(base),
        "empty": torch.empty(3, 0),
        "scalar": torch.tensor(2.5),
        "nested": [{"a": (1, 2.5, None, True, [b"x", "y"])}, {3, 4}, frozenset([5]), torch.Size((1, 2)), 2**70],
    }


def seeds() -> dict[str, bytes]:
    """The unmutated file of every shape; the same bytes in every process."""
    torch.manual_seed(0)
    state = {f"down.{i}.weight": torch.randn(2, 3) for i in range(3)} | {"ema": {"decay": 0.999}}
    big = repack([(n, b"big" if n.endswith("byteorder") else c) for n, c in records(saved(many_types()))])
    return {
        "zip": saved(state),
        "zip, lightning": lightning(),
        "zip, all types": saved(many_types()),
        "zip, protocol 4": saved(many_types(), pickle_protocol=4),
        "zip, big-endian": big,
        "stacked": saved(state, _use_new_zipfile_serialization=False),
        "stacked, lightning": lightning(_use_new_zipfile_serialization=False),
    }


@cache
def records(archive: bytes) -> tuple[tuple[str, bytes], ...]:
    """Names and contents of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return tuple((entry.filename, opened.read(entry)) for entry in opened.infolist())


@cache
def stacked(seed: bytes) -> tuple[bytes, ...]:
    """The five pickles of the format before 1.6, and what stands behind them."""
    window, parts = io.BytesIO(seed), []
    for _ in range(5):
        begin = window.tell()
        for _ in pickletools.genops(window):
            pass
        parts.append(seed[begin : window.tell()])
    return (*parts, seed[window.tell() :])


def repack(contents: Iterable[tuple[str, bytes]], deflated: frozenset[int] = frozenset()) -> bytes:
    """A valid archive of these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened, warnings.catch_warnings(action="ignore"):  # of doubled names
        for n, (name, content) in enumerate(contents):
            kind = zipfile.ZIP_DEFLATED if n in deflated else zipfile.ZIP_STORED
            opened.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- traps

TRAP = "accuquant_fuzz_trap"


class Trap:
    """Every way in which unpickling can call into a class; any of them leaves a mark."""

    sprung: list[str] = []  # noqa: RUF012

    def __new__(cls, *arguments: Any, **named: Any) -> "Trap":
        cls.sprung.append("new")
        return super().__new__(cls)

    def _spring(self, *arguments: Any, **named: Any) -> None:
        self.sprung.append("called")

    __call__ = __setstate__ = __setitem__ = append = extend = add = update = _spring


def spring(*arguments: Any) -> None:
    """A function for files to call."""
    Trap.sprung.append("function")


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def call(name: str, *arguments: bytes, with_: bytes = b"R") -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + b"(" + b"".join(arguments) + b"t" + with_


@cache
def attacks(mark: Path) -> tuple[bytes, ...]:
    """Pieces of pickle that would run code, break invariants or take all memory, if they were done as they say."""
    shell, python = text(f"touch {mark}"), text(f"open({str(mark)!r}, 'w').close()")
    system = call("builtins.getattr", call("builtins.__import__", text("os")), text("system"))
    trap = f"c{TRAP}\nTrap\n".encode()
    return (
        call("os.system", shell),
        call("posix.system", shell),
        call("subprocess.Popen", text("touch"), text(str(mark))),
        call("builtins.eval", python),
        call("__builtin__.exec", python),
        call("builtins.map", b"cbuiltins\neval\n", b"(" + python + b"l"),
        system + b"(" + shell + b"tR",
        call("operator.methodcaller", text("system"), shell)
        + b"("
        + call("importlib.import_module", text("os"))
        + b"tR",
        call("functools.partial", b"cos\nsystem\n", shell) + b")R",
        call("torch.load", text(str(mark))),
        call("torch.hub.load", text("a/b"), text("c")),
        call("torch.storage._load_from_bytes", b"C\x04abcd"),
        call("torch._utils._import_dotted_name", text("os.system")),
        call("torch.utils.data.datapipes.utils.decoder.basichandlers", text("pickle"), text("x")),
        call("torch.jit.unsupported_tensor_ops.execWrapper", python, b"}", b"}"),
        call(f"{TRAP}.spring"),
        call(f"{TRAP}.Trap"),
        call(f"{TRAP}.Trap", with_=b"\x81"),
        trap + b")\x81}b",
        trap + b")\x81" + text("a") + text("b") + b"s",
        trap + b")\x81(NNe",
        trap + b")R" + text("a") + b"a",
        b"(" + trap + b"o",
        f"(i{TRAP}\nTrap\n".encode(),
        text(TRAP) + text("Trap.append") + b"\x93)R",
        call("copyreg._reconstructor", trap, b"cbuiltins\nobject\n", b"N") + b"}b",
        b"}" + text("__class__") + trap + b"sb",
        call("collections.OrderedDict") + b"}" + text("__class__") + trap + b"sb",
        call("collections.OrderedDict") + b"}" + text("update") + f"c{TRAP}\nspring\n".encode() + b"sb",
        call("torch._utils._rebuild_parameter", trap, b"\x88", b"N"),
        call("torch._tensor._rebuild_from_type_v2", f"c{TRAP}\nspring\n".encode(), trap, b")", b"}"),
        call("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", b"K\0\x85", text("b")) + b"(K\x01tb",
        call("builtins.bytearray", b"\x8a\x06\0\0\0\0\0\x01"),
        call("torch.Size", b"(" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"t"),
        call("torch.empty", b"\x8a\x06\0\0\0\0\0\x01"),
        b"\x8b\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x",
        b"B\xff\xff\xff\xff",
        b"\x96" + b"\xff" * 8,
        b"\x95" + b"\xff" * 8,
        b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff",
        b"L" + b"9" * 5000 + b"L\n",
        b"I99999999999999999999\n",
        b")" + b"2\x86" * 60,
        b"]" + b"2(22e" * 10,
        b")" + b"\x85" * 2000,
        b"\x97\x98",
        b"\x82\x01\x84\xff\xff\xff\xff",
        b"Pos\n",
        b"(((",
        b"0" * 5,
        b"1",
    )


# ---------------------------------------------------------------------------------------------- mutations


def noise(data: bytes, source: random.Random) -> bytes:
    """Bytes changed, put in, left out or cut off, anywhere."""
    damaged = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4, 16))):
        at = source.randrange(len(damaged) + 1)
        match source.randrange(6):
            case 0 | 1 if at < len(damaged):
                damaged[at] ^= 1 << source.randrange(8)
            case 2 if at < len(damaged):
                damaged[at] = source.randrange(256)
            case 3:
                damaged[at:at] = source.randbytes(source.choice((1, 4, 64)))
            case 4:
                del damaged[at : at + source.choice((1, 4, 64, 1024))]
            case 5 if source.random() < 0.2:
                del damaged[at:]
    return bytes(damaged)


@cache
def tokens(pickled: bytes) -> tuple[bytes, ...]:
    """The pickle's opcodes with their arguments, one after the other."""
    starts = [position for _, _, position in pickletools.genops(pickled)]
    return tuple(pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True))


def opcodes(pickled: bytes, source: random.Random, mark: Path) -> bytes:
    """A pickle whose opcodes were dropped, repeated, exchanged, given other numbers, or joined by an attack."""
    parts = list(tokens(pickled))
    for _ in range(source.choice((1, 1, 2, 3))):
        at, other = source.randrange(len(parts)), source.randrange(len(parts))
        match source.randrange(8):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, parts[other])
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = source.choice(list(pickletools.code2op)).encode("latin-1") + parts[at][1:]
            case 4:
                numbers = [n for n, part in enumerate(parts) if part[:1] in b"KMJ\x8aI"] or [at]
                value = source.choice(EXTREMES)
                encoded = value.to_bytes(9, "little", signed=True)
                parts[source.choice(numbers)] = b"\x8a" + bytes([len(encoded)]) + encoded
            case 5:
                parts.insert(at, source.choice(attacks(mark)))
            case 6:
                parts.insert(at, source.choice(attacks(mark)) + b"0")
            case 7:
                names = [n for n, part in enumerate(parts) if part[:1] == b"c"] or [at]
                parts[source.choice(names)] = source.choice([p for p in parts if p[:1] == b"c"] + [b"cos\nsystem\n"])
        if not parts:
            break
    return b"".join(parts)


def directory(archive: bytes, source: random.Random) -> bytes:
    """An archive one of whose headers has another number in one of its fields."""
    damaged = bytearray(archive)
    sites = []
    for signature, fields in (
        (
            b"PK\x01\x02",
            ((8, "H"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (28, "H"), (30, "H"), (32, "H"), (42, "I")),
        ),
        (b"PK\x03\x04", ((6, "H"), (8, "H"), (18, "I"), (22, "I"), (26, "H"), (28, "H"))),
        (b"PK\x05\x06", ((4, "H"), (8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H"))),
    ):
        at = damaged.find(signature)
        while at >= 0:
            sites += [(at + offset, form) for offset, form in fields]
            at = damaged.find(signature, at + 1)
    for _ in range(source.choice((1, 1, 2))):
        at, form = source.choice(sites)
        width = struct.calcsize(form)
        value = source.choice((*EXTREMES, len(archive), len(archive) - 1, source.randrange(len(archive))))
        if at + width <= len(damaged):
            struct.pack_into("<" + form, damaged, at, value & (256**width - 1))
    return bytes(damaged)


def rearranged(given: Sequence[tuple[str, bytes]], source: random.Random) -> bytes:
    """An archive whose records were dropped, doubled, renamed, cut, exchanged or deflated."""
    contents, deflated = list(given), frozenset[int]()
    at, other = source.randrange(len(contents)), source.randrange(len(contents))
    name, content = contents[at]
    match source.randrange(8):
        case 0:
            del contents[at]
        case 1:
            contents.append((name, contents[other][1]))
        case 2:
            word = source.choice(WORDS).decode()
            contents[at] = (source.choice((word, f"{word}/{name}", name.replace("archive", word), f"/{name}")), content)
        case 3:
            contents[at] = (name, content[: source.randrange(len(content) + 1)])
        case 4:
            contents[at] = (name, content + bytes(source.choice((1, 64, 4096))))
        case 5:
            contents[at], contents[other] = (name, contents[other][1]), (contents[other][0], content)
        case 6:
            deflated = frozenset((at,))
        case 7:
            contents[at], deflated = (name, bytes(2**20)), frozenset((at,))
    return repack(contents, deflated)


def mutated(shape: str, seed: bytes, source: random.Random, mark: Path) -> bytes:
    """One mutation of a seed; `mark` is the file that its attacks would create."""
    kind = source.choice(("noise", "pickle noise", "opcodes", "opcodes", "opcodes", "layout"))
    if kind == "noise":
        return noise(seed, source)
    if shape.startswith("zip"):
        contents = list(records(seed))
        if kind == "layout":
            return rearranged(contents, source) if source.random() < 0.5 else directory(seed, source)
        at = next(n for n, (name, _) in enumerate(contents) if name.endswith("data.pkl"))
        name, pickled = contents[at]
        contents[at] = name, noise(pickled, source) if kind == "pickle noise" else opcodes(pickled, source, mark)
        return repack(contents)
    *pickles, storages = stacked(seed)
    at = source.choice((0, 1, 2, 3, 3, 3, 3, 3, 4))
    if kind == "layout":
        storages = noise(storages, source)
    else:
        pickles[at] = noise(pickles[at], source) if kind == "pickle noise" else opcodes(pickles[at], source, mark)
    return b"".join(pickles) + storages
