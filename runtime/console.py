"""What the commands share: errors as one sentence, progress as one bar, machine facts beside every number."""

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .errors import AccuQuantError

# Piped into a file, tables would be squeezed into 80 columns. No markup: much of what is printed stands in files.
console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def command(function: Callable[..., None]) -> Callable[[], None]:
    """A console entry point for `function`: user errors become one sentence and exit code 1, Ctrl-C exit code 130."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return _entry_point(app)


def commands(functions: Mapping[str, Callable[..., None]], about: str) -> Callable[[], None]:
    """Like `command`, of an entry point with a subcommand for each function."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=about)
    app.callback()(lambda: None)  # so that a single one is a subcommand too
    for name, function in functions.items():
        app.command(name)(function)
    return _entry_point(app)


def _entry_point(app: typer.Typer) -> Callable[[], None]:
    def main() -> None:
        try:
            app(standalone_mode=True)
        except AccuQuantError as error:
            if "--debug" in sys.argv:
                raise
            said = Text.assemble(("error:", "bold red"), f" {printable(str(error))}")
            Console(stderr=True, highlight=False, soft_wrap=True).print(said)
            sys.exit(1)
        except KeyboardInterrupt:
            Console(stderr=True).print(
                "interrupted; nothing half-written was left behind (accuquant-export goes on with --resume)"
            )
            sys.exit(130)

    return main


@contextmanager
def bar() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield `show(stage, done, total, note)`, which draws one bar per stage (plain lines without a terminal)."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note=note)
                if not console.is_terminal:
                    console.print(f"{stage} ...")
            progress.update(tasks[stage], completed=done, total=total, note=note)  # type: ignore[arg-type]

        yield show


def machine_facts() -> dict[str, str]:
    """Processor, its low-bit instructions, cores, memory and system: what a measured number depends on."""
    cpu, flags, memory = platform.processor() or platform.machine(), set[str](), 0
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shown = [f for f in ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    return {
        "cpu": cpu,
        "instructions": " ".join(shown),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def printable(text: str) -> str:
    """`text` as a terminal may see it: what would steer one, and what no encoding has, is spelt out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
