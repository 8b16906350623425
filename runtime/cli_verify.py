"""`accuquant-verify BUNDLE`: is it whole and unchanged, does it stay in its folder, and does it run here?"""

from pathlib import Path
from typing import Annotated

import typer

from .bundle import MANIFEST, Bundle, NetworkName
from .console import command, console, printable
from .trial import trial


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder written by accuquant-export.")],
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    load: Annotated[bool, typer.Option("--load/--no-load", help="Also compile the graphs and call them once.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Say what holds of a bundle. Exit code 1 with a sentence at the first thing that does not."""
    opened = Bundle(bundle)
    manifest, digests = opened.manifest, opened.digests
    size = sum((bundle / name).stat().st_size for name in digests)
    console.print(
        f"manifest  schema {manifest.schema_version}: {manifest.found}, {manifest.scheme} for {manifest.target}"
    )
    console.print(f"files     {len(digests)} as described ({size / 2**20:.2f} MiB), none outside the folder")
    present = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if not p.is_dir()}
    if strange := sorted(present - digests.keys() - {MANIFEST}):
        console.print(f"          not described, and never read: {', '.join(map(printable, strange))}")
    known = "its graphs know these timesteps only" if manifest.timesteps == "plan" else "its graphs take any timestep"
    console.print(f"plan      {opened.plan.sampler}, {len(opened.plan)} network calls; {known}")
    if load:
        sides: tuple[NetworkName, ...] = ("denoiser", "twin")
        for network in sides:
            if network in manifest.networks:
                console.print(f"{network:<9} {trial(opened, network, engine)}")
    console.print(f"{bundle} holds")


main = command(verify)
