"""All that takes a GPU to prove or refute, in one command and one JSON.

    python tools/verify_on_gpu.py                             # exports the reference model at fp16, W8A8, W4A8 and fp8
    python tools/verify_on_gpu.py BUNDLE.. --out gpu.json     # of bundles that were made with --target tensorrt

For every bundle and every engine that is installed (TensorRT, TensorRT-RTX; others with --engines):

    build      it compiles, loads, and gives the same bytes run after run
    precision  every operator runs in the precision that was asked, by the library's own report
    numerics   on latents of real trajectories it is as far from fp32 as the standard is (ONNX Runtime on the CPU)
    layers     every layer alone, on its own input, computes what the standard does
    benchmark  steps and whole sampling runs, float16 against the others, interleaved

Every stage is a process of its own (gpu_stages.py): what fails or crashes is recorded with its message, and the rest
goes on. Exit code 0 if all that was claimed held, 2 if something was refuted or failed, 3 if there is no GPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.cli_bench import batch_sizes
from accuquant.runtime.console import bar, command, console, machine_facts
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.files import write_text
from rich.table import Table

HERE = Path(__file__).parent
REFERENCE = HERE / "reference" / "fashion-ddim.ckpt"
PRECISIONS = ("fp16", "8/8", "4/8", "fp8")
DEFAULT_ENGINES = ("tensorrt", "tensorrt-rtx")
FLOAT16, FLOAT8 = "FP16", "FP8"
FROM_ADA = 89  # the compute capability from which GPUs multiply 8-bit floats
SAID = 1000  # characters of a failure


def in_child(stage: str, request: Mapping[str, Any], work: Path, seconds: float) -> dict[str, Any]:
    """A stage's answer: claims and facts, or how it failed, in the words of whoever refused."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        return answer_of(
            [sys.executable, str(HERE / "gpu_stages.py"), stage, str(asked), str(answer)], answer, seconds, work
        )


def answer_of(arguments: Sequence[str], answer: Path, seconds: float, cache: Path) -> dict[str, Any]:
    """Run a process that leaves its answer in a file; engines are kept below `cache`."""
    try:
        child = subprocess.run(
            arguments, capture_output=True, text=True, check=False, timeout=seconds,
            env=os.environ | {"ACCUQUANT_CACHE": str(cache / "cache")},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {seconds:.0f} s"}
    if answer.exists():
        told = json.loads(answer.read_text())
        return told | ({"failed": told["failed"][:SAID]} if "failed" in told else {})
    said = child.stderr.strip()[-SAID:] or "no last words"
    if child.returncode < 0:
        return {"failed": f"crashed ({signal.Signals(-child.returncode).name}): {said}"}
    return {"failed": f"gave no answer (exit code {child.returncode}): {said}"}


def outcome_of(told: Mapping[str, Any]) -> str:
    for what in ("failed", "skipped"):
        if what in told:
            return what
    return "held" if all(told["claims"].values()) else "refuted"


class Record:
    """All attempts so far, written to `out` after each, so that nothing is lost with the machine."""

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.out, self.about = out, about
        self.attempts: list[dict[str, Any]] = []

    def add(self, stage: str, subject: str, engine: str, told: Mapping[str, Any], seconds: float = 0.0) -> None:
        row = {"stage": stage, "subject": subject, "engine": engine, "seconds": seconds}
        self.attempts.append(row | {"outcome": outcome_of(told)} | dict(told))
        write_text(self.out, json.dumps(self.report, indent=1) + "\n")

    @property
    def report(self) -> dict[str, Any]:
        return {"schema_version": 1, **self.about, "held": self.held, "attempts": self.attempts}

    @property
    def held(self) -> bool:
        """Was something claimed, and nothing refuted and nothing failed?"""
        outcomes = {a["outcome"] for a in self.attempts}
        return any(a.get("claims") for a in self.attempts) and outcomes <= {"held", "skipped"}


def stages_of(bundle: Path, engine: str, batches: Sequence[int], n: int) -> list[tuple[str, dict[str, Any]]]:
    common = {"bundle": str(bundle), "engine": engine}
    builds = [("build", common | {"batch": batch}) for batch in dict.fromkeys([1, n, *batches])]
    return [*builds, ("precision", common), ("numerics", common | {"n": n}), ("layers", common | {"n": n})]


def table(record: Record) -> Table:
    made = Table(
        title="; ".join(f"{count} {what}" for what, count in Counter(a["outcome"] for a in record.attempts).items())
    )
    for column in ("stage", "of", "on", "", "what"):
        made.add_column(column)
    for a in record.attempts:
        broken = [claim for claim, held in a.get("claims", {}).items() if not held]
        said = a.get("failed") or a.get("skipped") or "; ".join(f"NOT: {claim}" for claim in broken)
        made.add_row(
            a["stage"], a["subject"], a["engine"], a["outcome"], (said or "; ".join(a["claims"])).replace("[", r"\[")
        )
    return made


def main(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders written by accuquant-export --target tensorrt [exports its own]."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("gpu.json"),
    engines: Annotated[str, typer.Option(help="Of these, those that are installed.")] = ",".join(DEFAULT_ENGINES),
    checkpoint: Annotated[Path, typer.Option(help="What is exported where no bundle is given.")] = REFERENCE,
    bits: Annotated[str, typer.Option(help="At which precisions, with commas.")] = ",".join(PRECISIONS),
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of those bundles.")] = 20,
    batch: Annotated[str, typer.Option(help="Batch sizes of the benchmark, with commas.")] = "1,8,64",
    n: Annotated[int, typer.Option("-n", min=1, help="Chains that numbers are compared on.")] = 4,
    repeats: Annotated[int, typer.Option(min=8, help="Timed steps of every bundle and batch size.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Timed whole sampling runs.")] = 5,
    work: Annotated[Path, typer.Option(help="Where bundles and engines are kept.")] = Path("build/verify-on-gpu"),
    seconds: Annotated[float, typer.Option(help="The longest that a stage may take.")] = 1800,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Build, look at, check and time engines on this machine's GPU."""
    sizes = batch_sizes(batch)
    work = work.resolve()
    shutil.rmtree(work / "cache", ignore_errors=True)  # engines are to be built now
    with bar() as show:
        facts = in_child("machine", {}, work, seconds)
        if "failed" in facts or facts["facts"]["gpu"] is None:
            why = facts.get("failed") or facts["facts"]["why_not"]
            write_text(
                out, json.dumps({"schema_version": 1, "machine": machine_facts(), **facts, "held": False}) + "\n"
            )
            console.print(f"nothing was verified: {why}; accuquant-doctor says what to install")
            raise typer.Exit(3)
        record = Record(out, {"machine": machine_facts(), "gpu": facts["facts"]})
        chosen = [engine for engine in engines.split(",") if engine in facts["facts"]["engines"]]
        if not chosen:
            raise AccuQuantError(
                f"none of {engines} is installed: pip install 'accuquant[tensorrt]' or 'accuquant[rtx]'"
            )

        def attempt(stage: str, subject: str, engine: str, request: Mapping[str, Any]) -> str:
            show(f"{stage} {engine}", 0, 1, subject)
            begun = time.perf_counter()
            told = in_child(stage, request, work, seconds)
            record.add(stage, subject, engine, told, time.perf_counter() - begun)
            show(f"{stage} {engine}", 1, 1, subject)
            return outcome_of(told)

        given = list(bundles or [])
        for asked in bits.split(",") if not given else []:
            path = work / f"{checkpoint.stem}-{asked.replace('/', '-')}"
            made = {"checkpoint": str(checkpoint), "bits": asked, "steps": steps, "out": str(path)}
            if attempt("export", asked, "", made) == "held":
                given.append(path)
        opened = {path: Bundle(path) for path in given}
        for engine in chosen:
            usable = []
            for path, bundle in opened.items():
                subject = f"{path.name} ({bundle.manifest.scheme})"
                if why := unfit(bundle, facts["facts"]["gpu"]):
                    record.add("build", subject, engine, {"skipped": why})
                    continue
                usable.append(path)
                for stage, request in stages_of(path, engine, sizes, n):
                    attempt(stage, subject, engine, request)
            for size in sizes:
                sides, why = contest(usable, opened)
                if why:
                    record.add("benchmark", f"batch {size}", engine, {"skipped": why})
                    continue
                asked_for = {"engine": engine, "batch": size, "repeats": repeats, "samples": samples}
                attempt("benchmark", f"batch {size}", engine, {"bundles": [str(p) for p in sides], **asked_for})
    console.print(table(record))
    console.print(f"{facts['facts']['gpu']}; {'all claims held' if record.held else 'NOT all held'}; written to {out}")
    if not record.held:
        raise typer.Exit(2)


def unfit(bundle: Bundle, gpu: str) -> str:
    """Why a bundle cannot run on this GPU; empty if it can."""
    if bundle.manifest.target != "tensorrt":
        return f"made for target {bundle.manifest.target}; export it with --target tensorrt"
    capability = int(gpu.rpartition("(sm")[2].rstrip(")"))
    if bundle.manifest.scheme == FLOAT8 and capability < FROM_ADA:
        return f"8-bit floats are for sm{FROM_ADA} and later"
    return ""


def contest(paths: Sequence[Path], bundles: Mapping[Path, Bundle]) -> tuple[list[Path], str]:
    """Bundles of one network and plan, float16 first, one of each scheme; or why there is nothing to compare."""
    by_scheme = {bundles[path].manifest.scheme: path for path in reversed(paths)}
    base = by_scheme.pop(FLOAT16, None)
    if base is None:
        return [], "no bundle in float16 (--bits fp16) to compare with"

    def same(path: Path) -> bool:
        ours, theirs = bundles[path], bundles[base]
        origin = [b.manifest.provenance.get("checkpoint_sha256") for b in (ours, theirs)]
        return origin[0] == origin[1] and ours.plan == theirs.plan

    others = [path for path in paths if path in by_scheme.values() and same(path)]
    return ([base, *others], "") if others else ([], "no other bundle of the float16 one's checkpoint and plan")


if __name__ == "__main__":
    command(main)()
