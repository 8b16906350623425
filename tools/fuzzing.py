"""Many inputs, one after another, in a process that is watched: what the fuzzers have in common.

The process says in lines of JSON which input it begins with and how that ended. Whatever ends the process - a crash,
memory, or a timer, of processor time and of twenty times that on the clock - is counted against the input it was at,
and another process goes on behind it.
"""

import json
import math
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuquant.runtime.errors import AccuQuantError

AT_ONCE = 20_000  # inputs that a process sees before another takes its place


def one_by_one(
    numbers: range, draw: Callable[[int], Callable[[], str]], acts: Callable[[], list[str]], limit_s: float, slack: int
) -> None:
    """The watched process: what `draw(n)` gives is called within the limits, and says how it ended.

    `acts` tells what was done since its last call that should not have been; `slack` bytes of address space may be
    taken beyond what is taken already.
    """
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + slack, size + slack))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in numbers:
        examine = draw(n)
        print(json.dumps({"begun": n}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # either of whose signals ends the process
        signal.setitimer(signal.ITIMER_REAL, 20 * limit_s)
        began = time.process_time()
        outcome = examine()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        report = {"outcome": outcome, "cpu_s": time.process_time() - began, "grown_mib": grown}
        print(json.dumps(report | {"acts": acts()}), flush=True)


def tally(
    command: Callable[[int, int, str], list[str]],
    count: int,
    show: Callable[[int], None],
    *,
    noun: str,
    acts: str,
    dies: str = "",
    until: float = math.inf,
    shared: str | None = None,
) -> dict[str, Any]:
    """Counts of every outcome over `count` inputs, fewer where `until` (seconds of time.time) comes first.

    `command(first, last, folder)` is the watched process of some of them, whose folder lies in `shared`. Of inputs that
    did harm there are the numbers: those that escaped, that did what `acts` is the name of, that hung and that crashed,
    the latter two together under `dies`, if it is somebody else who does.
    """
    outcomes = Counter[str]()
    harm: dict[str, list[dict[str, Any]]] = {name: [] for name in ("escaped", acts, "hangs", "crashes", dies) if name}
    slowest = grown = 0.0
    n = 0
    while n < count and time.time() < until:
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            arguments = [sys.executable, *command(n, min(count, n + AT_ONCE), folder)]
            child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert child.stdout is not None
            begun = n - 1
            for line in child.stdout:
                report = json.loads(line)
                if "begun" in report:
                    begun = report["begun"]
                    continue
                n = begun + 1
                outcome = report["outcome"]
                outcomes["escaped" if outcome.startswith("escaped") else outcome] += 1
                slowest, grown = max(slowest, report["cpu_s"]), max(grown, report["grown_mib"])
                if outcome.startswith("escaped"):
                    harm["escaped"].append({noun: begun, "what": outcome})
                if report["acts"]:
                    harm[acts].append({noun: begun, "what": report["acts"][:3]})
                if begun % 100 == 0:
                    show(begun)
                if time.time() > until:
                    child.terminate()
            ended = child.wait()
            if ended and not (ended == -signal.SIGTERM and time.time() > until):
                if begun < n:
                    raise AccuQuantError(f"the watched process ends with {ended} before its first {noun}")
                how = "hangs" if -ended in (signal.SIGALRM, signal.SIGPROF) else "crashes"
                harm[dies or how].append({noun: begun, "what": f"exit code {ended}"})
                n = begun + 1
    return {
        f"{noun}s": n,
        "outcomes": dict(outcomes.most_common()),
        **harm,
        "slowest_cpu_s": round(slowest, 4),
        "memory_grown_mib": round(grown, 1),
    }
