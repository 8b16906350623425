"""Requests of strangers as one batch: what each asked for, put together for one call of a pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..pipeline import Pipeline

LONGEST_PROMPT = 4000  # characters; a batch waits while the prompts of one of its requests become tokens
Wishes = Mapping[str, Sequence[Any]]  # arguments of Pipeline.generate, a value for every picture; "seeds" always


def merged(pipeline: Pipeline, asked: Sequence[Wishes]) -> dict[str, Any]:
    """`generate`'s arguments for all of them; where only some said something, the others get what is usual."""
    together: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for wishes in asked for name in wishes):
        together[name] = []
        for wishes in asked:
            together[name] += wishes[name] if name in wishes else _usual(pipeline, name, wishes["seeds"])
    return together


def _usual(pipeline: Pipeline, name: str, seeds: Sequence[int]) -> list[Any]:
    if name == "unwanted":
        return [""] * len(seeds)
    if name == "guidance":
        return [pipeline.denoiser.guidance] * len(seeds)
    return [] if pipeline.conditions is None else pipeline.conditions.wishes(seeds)
