"""Mutated checkpoint files, each read in a process that is watched: does one run code, crash or hang?

The files are those of mutate_checkpoints.py; most of their mutations know the formats, so that they get past checksums.
An execution is whatever Python's audit hooks report beyond the file being opened and mapped - an import, compiling,
a process, another file - or one of the traps having been stepped on. A hang ends the process by a timer, a crash ends
it by itself; both are counted against the file and the run goes on behind it. Files depend on seed, shape and number.

    python tools/fuzz_checkpoints.py --files 100000 --out tools/results/fuzz-checkpoints.json
"""

import json
import os
import random
import re
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuquant.calibrate.checkpoint import read_checkpoint
from accuquant.calibrate.families import FAMILIES
from accuquant.runtime.console import bar, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import write_text
from fuzzing import one_by_one, tally
from mutate_checkpoints import TRAP, Trap, mutated, seeds, spring
from torch import Tensor

HARMLESS = {"mmap.__new__", "builtins.id"}
SLACK = 2 * 2**30  # bytes of address space a reading process may take beyond what it starts with


class Watch:
    """What reading files did beyond reading them, by Python's audit events and the traps."""

    def __init__(self, path: Path, mark: Path) -> None:
        self.path, self.mark, self.on, self.seen = path, mark, False, list[str]()
        module = types.ModuleType(TRAP)
        module.Trap, module.spring = Trap, spring  # type: ignore[attr-defined]
        sys.modules[TRAP] = module
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event in HARMLESS:
            return
        if event == "open" and str(arguments[0]) == str(self.path) and (arguments[1] or "r") in ("r", "rb"):
            return
        self.seen.append(f"{event} {arguments!r:.200}")

    def examine(self, data: bytes) -> str:
        """How reading a file of these bytes ended: read, a refusal's first words, or an exception that escaped."""
        self.path.write_bytes(data)
        self.on = True
        try:
            stored = read_checkpoint(self.path)
            for family in FAMILIES:
                family.recognise(stored)
            touch(stored)
            outcome = "read"
        except AccuQuantError as error:
            found = re.fullmatch(REFUSALS, str(error).removeprefix(f"{self.path} "))
            outcome = f"refused: {found[1]}" + f", {found[2]}" * bool(found[2]) if found else f"escaped: {error!s:.200}"
        except Exception as error:
            outcome = f"escaped: {type(error).__name__}: {error!s:.200}"
        finally:
            self.on = False
        return outcome

    def executions(self) -> list[str]:
        """What was seen since the last call."""
        found = self.seen + [f"trap: {how}" for how in Trap.sprung] + ["mark"] * self.mark.exists()
        self.seen, Trap.sprung[:] = [], []
        self.mark.unlink(missing_ok=True)
        return found


REFUSALS = (
    r"(is cut off|is damaged|asks for code to be run|is no state dict|is empty)(?:.*\(.*?; (.*)\); copy it again|.*)"
)


def touch(stored: Any) -> None:
    """Read every element of every tensor in there: a view outside of its storage would crash."""
    waiting, seen = [stored], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            value.detach().clone()
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value


def read_some(shape: str, seed: int, first: int, last: int, limit_s: float, folder: Path) -> None:
    """A watched process: files first..last - 1."""
    original = seeds()[shape]
    watch = Watch(folder / "m.ckpt", folder / "mark")
    for example in seeds().values():  # what torch imports at its first use is not the file's doing
        watch.examine(example)
    watch.executions()

    def draw(n: int) -> Callable[[], str]:
        return partial(watch.examine, mutated(shape, original, random.Random(f"{seed} {shape} {n}"), watch.mark))

    one_by_one(range(first, last), draw, watch.executions, limit_s, SLACK)


def run_shape(shape: str, seed: int, files: int, limit_s: float, show: Callable[[int], None]) -> dict[str, Any]:
    """Counts of every outcome over `files` mutations of a shape, with the numbers of the files that did harm."""

    def command(first: int, last: int, folder: str) -> list[str]:
        return [__file__, "--child", shape, str(seed), str(first), str(last), str(limit_s), folder]

    return tally(command, files, show, noun="file", acts="executions")


def main(
    files: Annotated[int, typer.Option(help="how many mutated files, over all shapes")] = 100_000,
    out: Annotated[Path, typer.Option(help="where the counts go")] = Path("fuzz-checkpoints.json"),
    seed: Annotated[int, typer.Option(help="another seed, other files")] = 0,
    limit_s: Annotated[float, typer.Option(help="seconds a file may take")] = 30.0,
    workers: Annotated[int, typer.Option(help="shapes read at a time, each in a process of its own")] = 1,
) -> None:
    """Read mutated checkpoints and count executions, crashes and hangs; exit code 1 if there is one."""
    shapes = list(seeds())
    shares = [files // len(shapes) + (k < files % len(shapes)) for k in range(len(shapes))]
    began = time.time()
    with bar() as show, ThreadPoolExecutor(workers) as pool:

        def run(shape: str, share: int) -> dict[str, Any]:
            return run_shape(shape, seed, share, limit_s, lambda done: show(shape, done, share, ""))

        results = dict(zip(shapes, pool.map(run, shapes, shares), strict=True))
    kinds = ("executions", "crashes", "hangs", "escaped")
    totals = {kind: sum(len(result[kind]) for result in results.values()) for kind in kinds}
    found = {
        "what": "mutated checkpoint files read by calibrate/checkpoint.py",
        "files": files,
        "seed": seed,
        "limit_s": limit_s,
        **totals,
        "wall_s": round(time.time() - began),
        "shapes": results,
        "torch": torch.__version__,
        "machine": machine_facts(),
    }
    write_text(out, json.dumps(found, indent=1) + "\n")
    refused = sum(n for r in results.values() for outcome, n in r["outcomes"].items() if outcome != "read")
    console.print(f"{files:,} files, {refused:,} refused, {totals}; {out}")
    if any(totals.values()):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        shape, seed, first, last, limit_s, folder = sys.argv[2:]
        read_some(shape, int(seed), int(first), int(last), float(limit_s), Path(folder))
    else:
        typer.run(main)
