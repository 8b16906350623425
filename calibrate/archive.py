"""torch's checkpoint files as records: which bytes of the file are which storage.

torch.save writes a zip archive of uncompressed records, `<name>/data.pkl` and `<name>/data/<key>`; before 1.6 it wrote
pickles one after the other and the storages behind them. Nothing is extracted and nothing read twice: the file is
mapped, storages are tensors over the mapping, and all that a record or a count claims is held against the file's size.
"""

import io
import mmap
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from .rebuild import Rebuilder, Storage
from .unpickle import DamagedError

# Stable Diffusion's are below one MiB.
LARGEST_PICKLE = 64 * 2**20
LARGEST_DIRECTORY = 16 * 2**20
# All tensors together, in file sizes: weights may be shared or expanded, but not without end.
MOST_VIEWS = 16

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Record(NamedTuple):
    """Where in the file some bytes lie; `crc` is 0 where none was computed."""

    start: int
    size: int
    crc: int = 0


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote: tensors on the CPU, and Foreign for whatever is not plain.

    Tensors are views of the file, which must not be cut while they live; writing to them does not reach it.

    Raises:
        DamagedError: neither of torch's formats, not whole, or more claimed than there is.
        RunsCodeError: it names something that runs commands.
        OSError: it cannot be opened or mapped.
    """
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return _read_zip(path, mapped) if mapped[:4] == b"PK\x03\x04" else _read_stacked(mapped)
    # What malformed numbers, names and nesting raise in the standard library and in torch.
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError, struct.error) as error:
        raise DamagedError(f"{type(error).__name__} while reading it") from error


def _read_zip(path: Path, mapped: mmap.mmap) -> Any:
    records = _directory(path, mapped)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedError(f"{len(pickles)} records named data.pkl where one is expected")
    root, pickled = pickles[0].removesuffix("data.pkl"), records[pickles[0]]
    if pickled.size > LARGEST_PICKLE:
        raise DamagedError(f"a pickle of {pickled.size:,} bytes; at most {LARGEST_PICKLE:,} are read")
    order = b"little"
    if f"{root}byteorder" in records:
        order = _content(mapped, records[f"{root}byteorder"])
    if order not in (b"little", b"big"):
        raise DamagedError("an unknown byte order")
    data = {name.removeprefix(f"{root}data/"): r for name, r in records.items() if name.startswith(f"{root}data/")}
    rebuilder = Rebuilder(MappedStorages(mapped, data, order.decode()))
    return rebuilder.machine.run(io.BytesIO(_content(mapped, pickled)))


def _directory(path: Path, mapped: mmap.mmap) -> dict[str, Record]:
    """The archive's records by name: as they are, inside the file, and none over another."""
    try:
        with _BoundedFile(path) as opened:
            entries = ZipFile(opened).infolist()
    except (BadZipFile, NotImplementedError, OSError) as error:
        raise DamagedError(f"no readable directory of records: {str(error)[:100]}") from error
    records: dict[str, Record] = {}
    for entry in entries:
        if entry.compress_type != ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise DamagedError("compressed or encrypted records, which torch never writes")
        if entry.filename in records:
            raise DamagedError("two records of one name")
        header = mapped[entry.header_offset : entry.header_offset + 30] if entry.header_offset >= 0 else b""
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise DamagedError("records elsewhere than its directory says")
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + entry.file_size > len(mapped):
            raise DamagedError("records that end behind the file")
        records[entry.filename] = Record(start, entry.file_size, entry.CRC)
    if sum(record.size for record in records.values()) > len(mapped):
        raise DamagedError("records that lie over each other")
    return records


class _BoundedFile(io.FileIO):
    """The file for zipfile, which reads its directory at once: no more of it than a checkpoint can have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY:
            raise DamagedError(f"a directory of {size:,} bytes; at most {LARGEST_DIRECTORY:,} are read")
        return super().read(size) or b""


def _read_stacked(mapped: mmap.mmap) -> Any:
    """Five pickles - magic number, protocol, the writing machine, the object, the storages' keys - and the storages.

    Where a storage lies follows from the counts that the object's pickle declares, so that one is run twice.
    """
    magic, _, end = _pickle_at(mapped, 0)
    if magic != LEGACY_MAGIC:
        raise DamagedError("neither of torch's two formats")
    protocol, _, end = _pickle_at(mapped, end)
    if protocol != LEGACY_PROTOCOL:
        raise DamagedError("an unknown protocol number")
    _, _, begin = _pickle_at(mapped, end)
    _, declared, end = _pickle_at(mapped, begin)
    keys, _, end = _pickle_at(mapped, end)
    records: dict[str, Record] = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in declared or key in records:
            raise DamagedError("a storage that no tensor has")
        storage = declared[key]
        (count,) = struct.unpack("<q", mapped[end : end + 8])
        if count != storage.count or end + 8 + storage.size > len(mapped):
            raise DamagedError("a storage that is not whole")
        records[key] = Record(end + 8, storage.size)
        end += 8 + storage.size
    return _pickle_at(mapped, begin, MappedStorages(mapped, records, "little"))[0]


def _pickle_at(
    mapped: mmap.mmap, begin: int, storages: "MappedStorages | None" = None
) -> tuple[Any, dict[str, Storage], int]:
    """The object of the pickle at this byte, the storages it declares, and the byte behind it."""
    window = io.BytesIO(mapped[begin : begin + LARGEST_PICKLE])
    rebuilder = Rebuilder(storages)
    return rebuilder.machine.run(window), rebuilder.declared, begin + window.tell()


def _content(mapped: mmap.mmap, record: Record) -> bytes:
    content = mapped[record.start : record.start + record.size]
    if record.crc and zlib.crc32(content) != record.crc:
        raise DamagedError("a record whose checksum is another")
    return content


class MappedStorages:
    """Records as one-dimensional tensors over the mapping, each made and checked once."""

    def __init__(self, mapped: mmap.mmap, records: dict[str, Record], byteorder: str) -> None:
        self.mapped, self.records, self.swapped = mapped, records, byteorder != sys.byteorder
        self.made: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.left = MOST_VIEWS * len(mapped)

    def elements(self, storage: Storage, dtype: torch.dtype) -> Tensor:
        """All of a storage, (n,)."""
        if storage.key not in self.made:
            if storage.key not in self.records:
                raise DamagedError("a tensor whose storage is missing")
            self.made[storage.key] = dtype, self._bytes(self.records[storage.key], dtype)
        first, content = self.made[storage.key]
        if first != dtype:
            raise DamagedError("a storage of two types")
        if storage.size > len(content):
            raise DamagedError("a storage that claims more bytes than there are")
        return content[: storage.size].view(dtype)

    def spend(self, size: int) -> None:
        """Note that `size` more bytes are viewed by a tensor."""
        self.left -= size
        if self.left < 0:
            raise DamagedError(f"tensors of more than {MOST_VIEWS} times its size")

    def _bytes(self, record: Record, dtype: torch.dtype) -> Tensor:
        if record.size == 0:
            return torch.empty(0, dtype=torch.uint8)
        with memoryview(self.mapped) as whole, whole[record.start : record.start + record.size] as content:
            if record.crc and zlib.crc32(content) != record.crc:
                raise DamagedError("a storage whose checksum is another")
        data = torch.frombuffer(self.mapped, dtype=torch.uint8, count=record.size, offset=record.start)
        if dtype == torch.bool and data.max() > 1:
            raise DamagedError("truth values that are neither 0 nor 1")
        width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        if self.swapped and width > 1:
            return torch.from_numpy(data.numpy().view(f"u{width}").byteswap().view("u1"))
        return data if record.start % 64 == 0 else data.clone()  # kernels want aligned memory
