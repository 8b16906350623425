"""Type-check the TensorRT adapter against the published stubs of TensorRT 10.13, which stand for a library not here.

    python tools/check_stubs.py

The stubs' package asks for TensorRT itself, so it is unpacked beside the environment; five of its lines are no
Python and are mended first. What mypy says of the stubs themselves is left out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

STUBS = "tensorrt-stubs==10.13.0.35.1"
MODULES = ("accuquant.runtime.engines.tensorrt", "accuquant.runtime.engines.compile_plan")
# An argument named `in`; a default before one without; and Dims, which iterates.
MENDED = (
    (r"\bin: list", "in_: list"),
    (r"power: Weights = None, channel_axis: int\)", "power: Weights = None, channel_axis: int = 0)"),
    (r"(class Dims:\n)", r"\1    def __iter__(self) -> typing.Iterator[int]: ...\n"),
    (
        r"(def set_shape\(self, input: str), min: Dims, opt: Dims, max: Dims",
        r"\1, min: typing.Sequence[int], opt: typing.Sequence[int], max: typing.Sequence[int]",
    ),
)


def unpack(folder: Path) -> None:
    """The mended stubs in `folder`, which is on mypy's path."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder), STUBS],
        check=True,
    )
    path = folder / "tensorrt_bindings" / "tensorrt.pyi"
    text = path.read_text()
    for wrong, right in MENDED:
        text, count = re.subn(wrong, right, text)
        if not count:
            raise SystemExit(f"{path} has nothing like {wrong!r}: other stubs than those this was written for")
    path.write_text(text)
    (folder / "tensorrt_libs").mkdir()
    (folder / "tensorrt_libs" / "__init__.pyi").touch()


def main() -> None:
    build = Path(__file__).parents[1] / "build"
    stubs = build / STUBS.replace("==", "-")
    if not stubs.exists():
        part = stubs.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        unpack(part)
        part.rename(stubs)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *(part for module in MODULES for part in ("-m", module))],
        env=os.environ | {"MYPYPATH": f"{build}:{stubs}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ours = [line for line in done.stdout.splitlines() if "/accuquant/" in line]
    if ours or not re.search(r"checked \d+ source file", done.stdout):
        raise SystemExit("\n".join(ours) or done.stdout + done.stderr)
    print(f"{len(MODULES)} modules call nothing that {STUBS} does not declare")


if __name__ == "__main__":
    main()
