"""Teacher trajectories, and the latents they end in, on many workers of Ray.

The network travels to the workers as it is, its weights with it; the chunks are those of `simulate`, which thereby
makes the same bytes in this process as any number of workers of as many threads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.plan import SamplingPlan
from ..runtime.spread import Chunk, Made, map_chunks
from .trajectory import NOTHING, Condition, Progress, Trajectory, simulate


@dataclass(frozen=True)
class _Work:
    """What a worker samples with, on the network's device; `whole` keeps more than the latents at the end."""

    network: nn.Module
    plan: SamplingPlan
    shape: tuple[int, ...]
    whole: bool


class _Teacher:
    """A worker: it samples chunks of seeds."""

    def __init__(self, work: _Work, threads: int) -> None:
        self._work = work
        torch.set_num_threads(threads)

    def __call__(self, chunk: Chunk) -> Made:
        network, plan, shape, seeds = self._work.network, self._work.plan, self._work.shape, chunk["seeds"]
        condition = {name: torch.from_numpy(value) for name, value in chunk["condition"].items()}
        run = simulate(network, plan, seeds, shape, condition, batch=len(seeds))
        if not self._work.whole:
            return {"final": run.states[-1].numpy()}
        return {"states": run.states.transpose(0, 1).numpy(), "outputs": run.outputs.transpose(0, 1).numpy()}


def simulate_on_ray(
    network: nn.Module,
    plan: SamplingPlan,
    seeds: Sequence[int],
    shape: Sequence[int],
    condition: Condition = NOTHING,
    *,
    workers: int,
    batch: int = 32,
    progress: Progress | None = None,
) -> Trajectory:
    """`simulate` on `workers` processes, of as many threads as torch has here; `progress` counts seeds."""
    states, outputs, done = [], [], 0
    work, threads = _Work(network, plan, tuple(shape), True), torch.get_num_threads()
    for made in _spread(work, seeds, condition, workers, threads, batch):
        states.append(made["states"])
        outputs.append(made["outputs"])
        done += len(made["states"])
        if progress is not None:
            progress(done, len(seeds))
    whole = [torch.from_numpy(np.concatenate(parts)).transpose(0, 1).contiguous() for parts in (states, outputs)]
    return Trajectory(tuple(seeds), whole[0], whole[1], dict(condition))


def finals_on_ray(
    network: nn.Module,
    plan: SamplingPlan,
    seeds: Sequence[int],
    shape: Sequence[int],
    condition: Condition = NOTHING,
    *,
    workers: int,
    threads: int,
    batch: int = 32,
) -> Iterator[Tensor]:
    """The latents at the end of the chains alone, float32 (batch, C, H, W), in the order of the seeds."""
    work = _Work(network, plan, tuple(shape), False)
    for made in _spread(work, seeds, condition, workers, threads, batch):
        yield torch.from_numpy(made["final"])


def _spread(
    work: _Work, seeds: Sequence[int], condition: Condition, workers: int, threads: int, batch: int
) -> Iterator[Made]:
    device = next(work.network.parameters()).device.type
    rows = {name: value.cpu().numpy() for name, value in condition.items()}
    chunks = [
        {
            "seeds": list(seeds[first : first + batch]),
            "condition": {name: value[first : first + batch] for name, value in rows.items()},
        }
        for first in range(0, len(seeds), batch)
    ]
    arguments = {"work": work, "threads": threads}
    return map_chunks(_Teacher, arguments, chunks, workers, size=batch, threads=threads, on_gpu=device == "cuda")
