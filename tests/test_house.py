"""Rules of the house that no other test would notice being broken."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibrate", "export", "runtime")
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    """Top-level names of absolute imports, and the package that each relative import reaches."""
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield (node.module or "").split(".")[0]
            elif node.level == depth + 1:
                yield f"accuquant.{(node.module or '').split('.')[0]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    names = set(imported(path))
    assert "accuquant" not in names, "inside the package imports are relative"
    forbidden = {
        "runtime": {"torch", "onnx", "onnx_ir", "diffusers", "accuquant.calibrate", "accuquant.export"},
        "calibrate": {"onnx", "onnx_ir", "accuquant.export"},
        "export": set(),
    }[package]
    # Some checkpoints are published as ONNX files only; reading weights is all that calibration does with onnx.
    if path.relative_to(ROOT).as_posix() in ("calibrate/checkpoint.py", "calibrate/families/consistency.py"):
        forbidden -= {"onnx"}
    assert not names & forbidden


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_say_what_they_are_and_stay_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module begins with what it is about"
    assert len(text.splitlines()) <= 400


def test_only_commands_print():
    printing = {
        p.relative_to(ROOT).as_posix() for p in SOURCES if re.search(r"(?<![\w.])print\(|console\.print", p.read_text())
    }
    commands = {path for path in printing if path.rpartition("/")[2].startswith("cli")}
    # What commands print through, and a child process whose answer is what it prints.
    assert printing == commands | {"runtime/console.py", "runtime/footprint.py", "runtime/trial.py"}
    assert len(commands) > 1


def test_no_pickle_is_ever_executed():
    for path in [*SOURCES, *sorted((ROOT / "tools").glob("*.py"))]:
        text = path.read_text()
        assert "weights_only=False" not in text
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, path


def test_every_package_is_installed():
    """The wheel's package list is written by hand, since the root is the package."""
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"accuquant"} | {
        "accuquant." + p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for p in (ROOT / package).rglob("__init__.py")
    }
    assert listed == found


def test_commands_start_without_libraries_that_take_seconds_to_import():
    """They come in with the first checkpoint or sampler that needs them; a mistyped path is told at once."""
    code = "import sys, accuquant.export.cli; print({'diffusers', 'transformers', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
