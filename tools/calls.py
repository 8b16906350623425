"""What a network is called with while its bundle samples: data to calibrate peers with, and to compare engines on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.pipeline import Pipeline


def recorded(bundle: Bundle, seeds: Sequence[int], count: int) -> dict[str, np.ndarray]:
    """By input `count` rows, or all if there are fewer, evenly over the steps and chains of the float twin's sampling.

    Conditions are the bundle's own examples; of a guided network the rows under none are among them.
    """
    kept: list[dict[str, np.ndarray]] = []
    with Pipeline(bundle, network="twin", batch=len(seeds)) as pipeline:
        run = pipeline.engine.run

        def keep(fed: Mapping[str, np.ndarray]) -> np.ndarray:
            kept.append({name: value.copy() for name, value in fed.items()})
            return run(fed)

        pipeline.engine.run = keep  # type: ignore[method-assign]
        pipeline.generate(seeds)
    whole = {name: np.concatenate([fed[name] for fed in kept]) for name in kept[0]}
    rows = len(whole["t"])
    chosen = np.linspace(0, rows - 1, min(count, rows)).round().astype(int)
    return {name: value[chosen] for name, value in whole.items()}


def write(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """As the peers' scripts read it: an .npz with one array by input."""
    np.savez(path, **rows)  # type: ignore[arg-type]
