"""Files of condition rows: safetensors with a tensor (n, ...) for every input, and `empty.<input>` (...) for none.

    context (n, 120, 4096)  mask (n, 120)  empty.context (120, 4096)  empty.mask (120,)

One form serves three: what a model is calibrated with, the bundle's own examples, and what is sampled. float16 and
bfloat16 become float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from .bundle import ByRows
from .errors import AccuQuantError
from .files import atomic

EMPTY = "empty."
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "BOOL": np.bool_,
          "I64": np.int64, "I32": np.int32, "U8": np.uint8}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """float32 by input: `examples` (n, ...) and, where there are any, `empty` (...)."""

    examples: Mapping[str, np.ndarray]
    empty: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.examples.values())))

    def of(self, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        """The row of every seed that nobody chose one for, (len(seeds), ...) by input."""
        chosen = [seed % len(self) for seed in seeds]
        return {name: value[chosen] for name, value in self.examples.items()}


def read_rows(path: Path, known: ByRows) -> Rows:
    """The rows of a file, for a network that takes `known`.

    Raises:
        AccuQuantError: no such file, tensors missing, left over, of another shape or count, or not finite.
    """
    stored = _read(path)
    asked = f"needed are {described(known)}"
    names = {name for key in stored if (name := key.removeprefix(EMPTY)) in known.shapes}
    odd = sorted(key for key in stored if key.removeprefix(EMPTY) not in known.shapes)
    missing = sorted(known.shapes.keys() - names) or [n for n in known.shapes if n not in stored]
    if odd or missing:
        found = f"holds {odd[0]}" if odd else f"lacks {missing[0]}"
        raise AccuQuantError(f"{path} {found}; {asked}")
    examples = {name: stored[name] for name in known.shapes}
    empty = {name: stored[EMPTY + name] for name in known.shapes if EMPTY + name in stored}
    if 0 < len(empty) < len(examples):
        raise AccuQuantError(f"{path} holds rows that stand for none for {min(empty)} alone; give all or none")
    counts = {len(value) if value.ndim else 0 for value in examples.values()}
    if len(counts) > 1 or 0 in counts:
        raise AccuQuantError(f"{path} holds {sorted(counts)} rows; as many of every input are expected; {asked}")
    for name, shape in known.shapes.items():
        _check(path, name, examples[name].shape[1:], shape)
        if empty:
            # One row, with or without an axis to count it.
            row = empty[name][0] if empty[name].shape == (1, *examples[name].shape[1:]) else empty[name]
            empty[name] = row
            _check(path, EMPTY + name, row.shape, examples[name].shape[1:])
    for name, value in [*examples.items(), *((EMPTY + k, v) for k, v in empty.items())]:
        if not np.isfinite(value).all():
            raise AccuQuantError(f"{path}: {name} holds values that are not finite; make it again")
    return Rows(examples, empty)


def save_rows(path: Path, rows: Rows) -> None:
    named = {**rows.examples, **{EMPTY + name: value for name, value in rows.empty.items()}}
    with atomic(path) as part:
        save_file({name: np.ascontiguousarray(value) for name, value in named.items()}, part)


def described(known: ByRows) -> str:
    """What a file of rows holds, in words."""
    inputs = [f"{name} ({', '.join(['n', *('any' if d is None else str(d) for d in shape)])})"
              for name, shape in known.shapes.items()]  # fmt: skip
    return f"{', '.join(inputs)}, and for guidance their rows for none, {EMPTY}{next(iter(known.shapes))} and so on"


def _check(path: Path, name: str, found: tuple[int, ...], shape: tuple[int | None, ...]) -> None:
    if len(found) != len(shape) or any(d not in (None, n) for n, d in zip(found, shape, strict=True)):
        wanted = ", ".join("any" if d is None else str(d) for d in shape)
        raise AccuQuantError(f"{path}: a row of {name} has the shape ({', '.join(map(str, found))}), "
                             f"({wanted}) is expected")  # fmt: skip


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        stored = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise AccuQuantError(f"{path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise AccuQuantError(f"{path} is not a readable safetensors file ({error}); make it again") from error
    found = {}
    for name, tensor in stored:
        if tensor["dtype"] not in DTYPES:
            raise AccuQuantError(f"{path}: {name} is {tensor['dtype']}; float32, float16 or bfloat16 is expected")
        values = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found[name] = values.astype(np.float32)
    return found
