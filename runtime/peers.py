"""Step latency of a bundle beside other engines for the same network: one run, all of them in turn.

A peer is anything that opens as an engine: a graph file that another quantizer wrote, or a framework that runs the
network itself. What cannot be opened or run is a row with the reason, and no ratio is made of it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import noise
from .benchmark import Side, steps_of
from .bundle import Bundle
from .denoiser import Denoiser, engine_batch
from .engines import ALL, choose, open_engine
from .engines.base import Engine, EngineOptions
from .errors import AccuQuantError
from .interleave import gain, interleaved, spread
from .pipeline import Pipeline

OpenPeer = Callable[[EngineOptions], Engine]


def parse_peer(text: str) -> tuple[str, OpenPeer]:
    """Name and opener of "NAME=GRAPH" or "NAME=GRAPH@ENGINE".

    Raises:
        AccuQuantError: not of that form, no such file, or no such engine.
    """
    name, _, rest = text.partition("=")
    file, _, engine = rest.partition("@")
    if not name or not file or engine not in {"", *ALL}:
        raise AccuQuantError(f"--compare {text}: write NAME=GRAPH or NAME=GRAPH@ENGINE, with {', '.join(ALL)}")
    path, chosen = Path(file), choose(engine or "auto")
    if not path.exists():
        raise AccuQuantError(f"--compare {text}: {path} does not exist")
    return name, lambda options: open_engine(path, options, chosen)


def beside(
    bundle: Bundle,
    sides: Sequence[Side],
    peers: Mapping[str, OpenPeer],
    engine: str,
    options: EngineOptions,
    repeats: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """One batch size: seconds of a step of our sides and of all peers, and how much faster the first side is.

    `saves` is what our last side saves of a row's step, with its 99 % confidence interval: positive where it is faster,
    None of too few repeats to tell.
    """
    rows: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    with ExitStack() as held:
        for side in sides:
            pipeline = Pipeline(
                bundle,
                network=side.network,
                engine=engine,
                batch=options.batch,
                threads=options.threads,
                rest=side.rest,
            )
            held.callback(pipeline.close)
            calls |= steps_of({side.name: pipeline})
            rows[side.name] = {"ours": True, "engine": pipeline.engine.name}
        for name, open_peer in peers.items():
            try:
                opened = open_peer(
                    EngineOptions(engine_batch(options.batch, pipeline.denoiser.guidance), options.threads)
                )
                held.callback(opened.close)
                calls[name] = _step(opened, pipeline)
                calls[name]()
                rows[name] = {"ours": False, "engine": opened.name}
            except Exception as error:  # another library's: whatever it is, the others go on
                calls.pop(name, None)
                rows[name] = {"ours": False, "failed": f"{error}"[:300] or type(error).__name__}
        taken = interleaved(calls, repeats, progress)
    first, last = (taken[side.name] for side in (sides[0], sides[-1]))
    for name, seconds in taken.items():
        saves = gain(seconds, last)
        rows[name] |= {
            "step_seconds": spread(seconds),
            "step_speedup": float(np.median(first) / np.median(seconds)),
            "saves": asdict(saves) if np.isfinite(saves.low) else None,
        }
    return {"batch": options.batch, "to": sides[0].name, "by": sides[-1].name, "rows": rows}


def _step(engine: Engine, like: Pipeline) -> Callable[[], object]:
    fed = Denoiser(engine, like.batch, like.denoiser.guidance).feed(
        noise.batch(range(like.batch), -1, like.shape), like.plan.steps[0].timestep
    )
    return lambda: engine.run(fed)
