"""A network of a bundle compiled and called once, in a process that may die of it.

An engine is a large library in C++: there are files that crash it, or keep it busy for ever. Who asks whether a bundle
holds is told so in a sentence.

    python -m accuquant.runtime.trial BUNDLE NETWORK ENGINE        prints what it runs on
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import noise
from .bundle import Bundle, NetworkName
from .errors import AccuQuantError
from .pipeline import Pipeline

PATIENCE = 1800.0  # seconds
REFUSED = 3  # exit code


def trial(bundle: Bundle, network: NetworkName, engine: str) -> str:
    """What `called` says, of a process of its own.

    Raises:
        AccuQuantError: what `called` refuses, and a process that crashes or does not end.
    """
    asked = [sys.executable, "-m", __name__, str(bundle.folder.resolve()), network, engine]
    graph = bundle.graph(network)
    again = "it is damaged, or was made to do that: get the bundle from its maker again"
    try:
        child = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise AccuQuantError(f"{graph} keeps the engine busy for more than {PATIENCE:.0f} s; {again}") from error
    if child.returncode == REFUSED:
        raise AccuQuantError(child.stderr.strip())
    if child.returncode < 0:
        raise AccuQuantError(f"{graph} crashes the engine ({signal.strsignal(-child.returncode)}); {again}")
    if child.returncode:
        raise AccuQuantError(f"{graph} could not be tried: {child.stderr.strip()[-300:]}")
    return child.stdout.strip()


def called(bundle: Bundle, network: NetworkName, engine: str) -> str:
    """The network on an engine of this machine, called once on noise; with it the networks around it.

    Raises:
        AccuQuantError: it does not load, or what it gives is no picture's.
    """
    shape = bundle.manifest.sample_shape
    with Pipeline(bundle, network=network, engine=engine, batch=1) as pipeline:
        x = noise.batch([0], -1, shape)
        if pipeline.conditions is not None:
            free = pipeline.conditions.free() if pipeline.denoiser.is_guided else None
            pipeline.denoiser.under(pipeline.conditions.rows(pipeline.conditions.wishes([0])), free)
        out = pipeline.denoiser(x, bundle.plan.steps[0].timestep)
        if out.shape != x.shape or not np.isfinite(out).all():
            raise AccuQuantError(
                f"{bundle.graph(network)} gives {out.shape}, or numbers that are not finite, for {x.shape}"
            )
        pictures = pipeline.pictures(x)
        return f"runs on {pipeline.engine.name}; pictures are {pictures.shape[2]}x{pictures.shape[1]}"


def _main(folder: str, network: NetworkName, engine: str) -> None:
    try:
        print(called(Bundle(Path(folder)), network, engine))
    except AccuQuantError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
