"""Mutated bundles opened as people open them: does anything but a refusal in words come out?

The bundles of mutate_bundles.py are opened in a process with limits on time and memory, and sampled from as far as that
takes no engine; every fiftieth is opened by the command `accuquant-verify` too. Where a graph was changed, every
fortieth is also loaded and called, on OpenVINO and on ONNX Runtime in turn, here and not, as the command does, in a
process that may die of it. Harm is an exception of another kind, control characters on the terminal, a file outside the
folder opened, a process started, a parser given bytes that the manifest does not vouch for, a hang and a crash. Loading
a graph that the manifest does vouch for can crash or hang a library that is not ours; that is counted apart, as the
engine's.

    python tools/fuzz_bundles.py --manifests 100000 --plans 100000 --graphs 100000 --out tools/results/fuzz-bundles.json
    python tools/fuzz_bundles.py --guided --manifests 100000 --plans 100000 --graphs 100000  # by coverage, with atheris

Bundles depend on kind, seed and number; those that atheris draws, on what it has seen.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

try:
    import atheris
except ImportError:
    atheris = None
GUIDED = "--guided" in sys.argv
with atheris.instrument_imports(include=["accuquant.runtime"]) if atheris and GUIDED else nullcontext():
    from accuquant.runtime import bundle as bundles
    from accuquant.runtime import cli_verify, conditions, trial
    from accuquant.runtime.bundle import Bundle, ByText
    from accuquant.runtime.console import bar, console, machine_facts
    from accuquant.runtime.errors import AccuQuantError
    from accuquant.runtime.files import sha256, write_text
    from accuquant.runtime.plan import SamplingPlan
from fuzzing import one_by_one, tally  # noqa: E402
from mutate_bundles import CHANGED, Mutations  # noqa: E402

SLACK = 4 * 2**30  # bytes of address space a process may take beyond what it starts with
SHARED = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where short-lived files cost least
HARM = ("escaped", "acts", "hangs", "crashes")
PRINTED = "\n\t"
CAUSES = (
    "is not a manifest", "is not a file of the bundle", "is missing", "is not the file the manifest describes",
    "does not describe", "which the manifest does not name", "is not an ONNX graph", "is not a sampling plan",
    "cannot be read", "produced values that are not finite", "takes", "holds no", "not finite", "out of range",
)  # fmt: skip


class Watch:
    """What opening a bundle did beyond reading its files, by Python's audit events and at its parsers' doors."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = folder, False, list[str]()
        bundles.external_files = self._vouched(bundles.external_files)
        conditions.read_rows = self._vouched(conditions.read_rows)
        SamplingPlan.load = self._vouched(SamplingPlan.load)  # type: ignore[method-assign]
        sys.addaudithook(self._event)

    def _vouched(self, parser: Callable[..., Any]) -> Callable[..., Any]:
        """`parser`, which must not be called for bytes whose digest the manifest does not have."""

        def parse(path: Path, *rest: Any) -> Any:
            if self.on and sha256(path) not in (self.folder / "manifest.json").read_text():
                self.seen.append(f"{path.name} was parsed and its digest is not the manifest's")
            return parser(path, *rest)

        return parse

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened = os.path.realpath(arguments[0])
            if not opened.startswith((str(self.folder), "/proc", "/sys")) and not opened.endswith(
                (".py", ".pyc", ".so")
            ):
                self.seen.append(f"opened {opened}")
        elif event.startswith(("os.system", "os.exec", "os.fork", "subprocess", "socket", "exec", "compile")):
            self.seen.append(f"{event} {arguments!r:.100}")

    def examine(self, engine: str = "", by_command: bool = False) -> str:
        """How opening, and loading on an `engine`, ended: holds, the cause of a refusal, or what escaped."""
        said, self.on = io.StringIO(), True
        sys.argv = ["accuquant-verify", str(self.folder), "--no-load"]
        try:
            with redirect_stdout(said), redirect_stderr(said):
                if by_command:
                    with suppress(SystemExit):
                        cli_verify.main()
                opened = Bundle(self.folder)
                for network in opened.manifest.networks if engine else []:
                    if network in ("denoiser", "twin"):
                        trial.called(opened, network, engine)
                use(opened)
            outcome = "holds"
        except AccuQuantError as error:
            outcome = f"refused: {cause(str(error))}"
        except (Exception, SystemExit) as error:
            outcome = f"escaped: {type(error).__name__}: {error!s:.200}"
        finally:
            self.on = False
        if strange := {c for c in said.getvalue() if not (c.isprintable() or c in PRINTED)}:
            self.seen.append(f"printed {strange}")
        return outcome

    def actions(self) -> list[str]:
        """What was seen since the last call."""
        found, self.seen = self.seen, []
        return found


def cause(said: str) -> str:
    text = " ".join(said.split())
    return next((words for words in CAUSES if words in text), "in other words")


def use(bundle: Bundle) -> None:
    """What users do with a bundle that holds, as far as it takes no engine; raises AccuQuantError, if anything."""
    plan, manifest = bundle.plan, bundle.manifest
    if not isinstance(manifest.conditioning, ByText):
        known = conditions.open_conditions(bundle)
        if known is not None:
            known.rows(known.wishes([0, 2**64 - 1]))
    for network in manifest.networks:
        bundle.weight_bytes(network)
    x = np.ones((1, 1, 2, 2), np.float32)
    plan.sample(lambda x, t: 0.1 * x, lambda j: x, on_output=lambda i, x, o: [plan.glance(i, x, o)][:0])


def open_some(kind: str, seed: int, first: int, last: int, limit_s: float, loaded: int, folder: Path) -> None:
    """A watched process: bundles first..last - 1; of graphs, every `loaded`th goes to an engine."""
    warnings.simplefilter("ignore")
    made, watch = Mutations(kind, folder), Watch(folder)
    for engine in ("openvino", "onnxruntime"):  # what is imported at first use is not the bundle's doing
        found = watch.examine(engine, by_command=True)
        assert found == "holds", found
    made.write(random.Random(0))
    watch.examine(by_command=True)
    watch.actions()

    def draw(n: int) -> Callable[[], str]:
        made.write(random.Random(f"{seed} {kind} {n}"))
        turn, rest = divmod(n, loaded)
        engine = ("openvino", "onnxruntime")[turn % 2] if kind == "graph" and not rest else ""
        return partial(watch.examine, engine, n % 50 == 0)

    one_by_one(range(first, last), draw, watch.actions, limit_s, SLACK)


def run_kind(
    kind: str, seed: int, count: int, limit_s: float, loaded: int, until: float, show: Callable[[int], None]
) -> dict[str, Any]:
    """Counts of every outcome over `count` bundles of a kind at most, with the numbers of those that did harm."""

    def command(first: int, last: int, folder: str) -> list[str]:
        return [__file__, "--child", kind, str(seed), str(first), str(last), str(limit_s), str(loaded), folder]

    # A changed graph that is not vouched for is refused before an engine is asked.
    dies = "engine" if kind == "graph" else ""
    return tally(command, count, show, noun="bundle", acts="acts", dies=dies, until=until, shared=SHARED)


def guided(kind: str, seed: int, count: int, folder: Path) -> None:
    """Draw bundles by the coverage of what opens them; the first harm is an exception, which ends the process."""
    warnings.simplefilter("ignore")
    made, watch = Mutations(kind, folder), Watch(folder)
    watch.examine()
    watch.actions()

    def one(data: bytes) -> None:
        made.put(CHANGED[kind][0], data, True)
        outcome = watch.examine()
        harm = [outcome] * outcome.startswith("escaped") + watch.actions()
        if harm:
            raise RuntimeError(f"{harm} of {data!r:.500}")

    def mutate(data: bytes, most: int, number: int) -> bytes:
        return made.changed(data, random.Random(number))[:most]

    corpus = folder / "corpus"
    corpus.mkdir()
    for k, data in enumerate(made.seeds()):
        (corpus / str(k)).write_bytes(data)
    arguments = [
        sys.argv[0],
        f"-runs={count}",
        f"-seed={seed + 1}",
        "-max_len=20000",
        "-rss_limit_mb=8000",
        str(corpus),
    ]
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def run_guided(kind: str, seed: int, count: int) -> dict[str, Any]:
    """The same counts as far as a guided run knows them, and what it covered."""
    if atheris is None:
        raise AccuQuantError("atheris is not installed; install it with: pip install 'accuquant[fuzz]'")
    with tempfile.TemporaryDirectory(dir=SHARED) as folder:
        command = [sys.executable, __file__, "--child", "--guided", kind, str(seed), str(count), folder]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
    covered = re.findall(r"#(\d+)\s.*?cov: (\d+) ft: (\d+)", ended.stderr)
    if not covered:
        raise AccuQuantError(f"atheris did not start: {ended.stderr[-500:]}")
    runs, edges, features = map(int, covered[-1])
    harm: dict[str, Any] = {name: [] for name in HARM}
    if ended.returncode:
        harm["escaped"] = [{"bundle": runs, "what": ended.stderr[-2000:]}]
    return {"bundles": runs, **harm, "edges": edges, "features": features}


def main(
    manifests: Annotated[int, typer.Option(help="how many bundles with a changed manifest")] = 100_000,
    plans: Annotated[int, typer.Option(help="with a changed plan")] = 100_000,
    graphs: Annotated[int, typer.Option(help="with a changed graph")] = 100_000,
    loaded: Annotated[int, typer.Option(min=1, help="of changed graphs, load every so manieth on an engine")] = 40,
    out: Annotated[Path, typer.Option(help="where the counts go")] = Path("fuzz-bundles.json"),
    seed: Annotated[int, typer.Option(help="another seed, other bundles")] = 0,
    limit_s: Annotated[float, typer.Option(help="seconds of processor time a bundle may take")] = 30.0,
    minutes: Annotated[float, typer.Option(help="after which a kind is done, however many it were")] = 600.0,
    by_coverage: Annotated[bool, typer.Option("--guided", help="draw by coverage; no graph is loaded")] = False,
) -> None:
    """Open mutated bundles and count what is no refusal; exit code 1 if there is any."""
    results, began = {}, time.time()
    with bar() as show:
        for kind, count in {"manifest": manifests, "plan": plans, "graph": graphs}.items():
            if count and by_coverage:
                results[kind] = run_guided(kind, seed, count)
            elif count:
                until = time.time() + 60 * minutes
                results[kind] = run_kind(
                    kind, seed, count, limit_s, loaded, until, lambda n, k=kind, c=count: show(k, n, c, "")
                )
    totals = {name: sum(len(result[name]) for result in results.values()) for name in HARM}
    found = {
        "what": "mutated bundles opened by accuquant-verify" + ", drawn by coverage" * by_coverage,
        "seed": seed,
        "limit_s": limit_s,
        "graphs_loaded": "none" if by_coverage else f"every {loaded}th",
        **totals,
        "wall_s": round(time.time() - began),
        "kinds": results,
        "machine": machine_facts(),
    }
    write_text(out, json.dumps(found, indent=1) + "\n")
    console.print(f"{sum(r['bundles'] for r in results.values()):,} bundles, {totals}; {out}")
    if any(totals.values()):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--child", "--guided"]:
        kind, seed, count, folder = sys.argv[3:]
        guided(kind, int(seed), int(count), Path(folder))
    elif sys.argv[1:2] == ["--child"]:
        kind, seed, first, last, limit_s, loaded, folder = sys.argv[2:]
        open_some(kind, int(seed), int(first), int(last), float(limit_s), int(loaded), Path(folder))
    else:
        typer.run(main)
