"""Which other files an ONNX graph reads: the locations of its external data, found without loading it.

Engines follow such a location wherever it points, so it is looked at before they do; and so is the version of the
operators, since OpenVINO 2026.4 counts up to it. This walks the protobuf wire format along the messages that lead to
both, and skips over everything else, weights among it.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from .errors import AccuQuantError

# Field numbers of onnx.proto by message, and the message that each one holds.
LEADS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "opset": {},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
VERSION, NEWEST = 2, 1000  # of an opset: its field, and more than there will be for long
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5


def external_files(path: Path) -> set[str]:
    """Locations of external data in the graph at `path`, as they stand there.

    Raises:
        AccuQuantError: it is cut off, no protobuf at all, or of operators that nobody has.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data))
    except ValueError as error:  # of an empty file, or from below
        raise AccuQuantError(f"{path} is not an ONNX graph ({error}); copy the bundle again") from None


def _locations(data: mmap.mmap) -> Iterator[str]:
    open_messages = [("model", 0, len(data))]
    while open_messages:
        message, start, end = open_messages.pop()
        found = dict[str, bytes]()
        for number, kind, first, last in _fields(data, start, end):
            if kind == VARINT:
                if message == "opset" and number == VERSION and (version := _varint(data, first, last)[0]) > NEWEST:
                    raise ValueError(f"operators of version {version}")
                continue
            inner = LEADS[message].get(number)
            if message == "entry" and inner:
                found[inner] = data[first:last]
            elif inner:
                open_messages.append((inner, first, last))
        if found.get("key") == b"location":
            yield found.get("value", b"").decode("utf-8", "replace")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, kind, first byte, byte after the last) of a message's fields that are numbers or have a length."""
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == VARINT:
            first, (_, at) = at, _varint(data, at, end)
            yield tag >> 3, kind, first, at
        elif kind in (EIGHT, FOUR):
            at += 8 if kind == EIGHT else 4
        elif kind == BYTES:
            length, at = _varint(data, at, end)
            if at + length > end:
                raise ValueError("it is cut off")
            yield tag >> 3, kind, at, at + length
            at += length
        else:
            raise ValueError(f"wire type {kind}")
    if at > end:
        raise ValueError("it is cut off")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it is cut off")
