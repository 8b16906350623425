"""Say what is missing before an installation starts: Python's version, its venv module, disk, the package registry."""

import importlib.util
import shutil
import subprocess
import sys

NEEDED_GIB = 4


def missing() -> list[str]:
    """One sentence for each prerequisite that does not hold."""
    found = []
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything checked the version
        found.append(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; "
            "name another one with: make demo PYTHON=python3.12"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        found.append("Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv")
    free = shutil.disk_usage(".").free / 2**30
    if free < NEEDED_GIB:
        found.append(f"{NEEDED_GIB} GiB of disk are needed here for the environment, {free:.1f} GiB are free")
    if not found:
        probe = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".registry-probe", "six"],
            capture_output=True,
            text=True,
            check=False,
        )
        shutil.rmtree(".registry-probe", ignore_errors=True)
        if probe.returncode:
            last = (probe.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            found.append(f"no package registry can be reached ({last}); check the network or pip's index settings")
    return found


if __name__ == "__main__":
    problems = missing()
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)
