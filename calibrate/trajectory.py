"""Teacher trajectories: what the full-precision network does, step by step, from given seeds.

    o_i = f(s_i x_i, t_i; c),   x_{i+1} = a_i x_i + sum_j b_ij o_j + sum_j c_ij z_j

with a condition c (a class, a text's embedding) that belongs to the seed and stays for the whole chain.
Kept are the latents x_0..x_S, from which every group starts and at which it must end, and the outputs o_i, which
multistep samplers carry across a group's boundary. Both are small beside one network's activations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..runtime import noise
from ..runtime.files import atomic
from ..runtime.plan import SamplingPlan

Progress = Callable[[int, int], None]  # done, total
Condition = Mapping[str, Tensor]  # network inputs beside x and t by name, each (B, ...)
NOTHING: Condition = {}


def step_noise(seeds: Sequence[int], index: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """The runtime's own noise as a torch tensor (len(seeds), *shape), float32."""
    return torch.from_numpy(noise.batch(seeds, index, shape)).to(device)


@dataclass(frozen=True)
class Trajectory:
    """Teacher runs of several seeds: states (S+1, N, C, H, W) and outputs (S, N, C', H, W), float32 on the CPU.

    `condition` is what each seed was sampled under, (N, ...) by name.
    """

    seeds: tuple[int, ...]
    states: Tensor
    outputs: Tensor
    condition: Condition = field(default_factory=dict)

    def condition_of(self, rows: Sequence[int] | slice, device: torch.device | str) -> Condition:
        """The condition of some of the seeds, on `device`."""
        index = rows if isinstance(rows, slice) else list(rows)
        return {name: value[index].to(device) for name, value in self.condition.items()}

    def save(self, path: Path) -> None:
        with atomic(path) as part:
            tensors = {"states": self.states, "outputs": self.outputs, "seeds": torch.tensor(self.seeds)}
            tensors |= {f"condition/{name}": value.contiguous() for name, value in self.condition.items()}
            save_file(tensors, part)

    @classmethod
    def load(cls, path: Path) -> "Trajectory":
        stored = load_file(path)
        seeds = tuple(int(s) for s in stored["seeds"])
        condition = {k.removeprefix("condition/"): v for k, v in stored.items() if k.startswith("condition/")}
        return cls(seeds, stored["states"], stored["outputs"], condition)


@torch.no_grad()
def simulate(
    network: nn.Module,
    plan: SamplingPlan,
    seeds: Sequence[int],
    shape: Sequence[int],
    condition: Condition = NOTHING,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> Trajectory:
    """Run `network` (whatever its quantizers are set to) over the whole plan, `batch` seeds at a time.

    `condition` holds a row for every seed.
    """
    device = next(network.parameters()).device
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    chunks = [list(seeds[i : i + batch]) for i in range(0, len(seeds), batch)]
    for n, chunk in enumerate(chunks):
        x = plan.init_sigma * step_noise(chunk, -1, shape, device)
        xs, os = [x.cpu()], []
        given = {name: value[n * batch : n * batch + len(chunk)].to(device) for name, value in condition.items()}
        live: dict[int, Tensor] = {}
        for i in range(len(plan)):
            live[i] = call(network, plan, i, x, given)
            x = plan.advance(i, x, live, lambda j, c=chunk: step_noise(c, j, shape, device))  # type: ignore[misc]
            xs.append(x.cpu())
            os.append(live[i].cpu())
            live = {j: o for j, o in live.items() if plan.last_use[j] > i}
            if progress is not None:
                progress(n * len(plan) + i + 1, len(chunks) * len(plan))
        states.append(torch.stack(xs))
        outputs.append(torch.stack(os))
    return Trajectory(tuple(seeds), torch.cat(states, dim=1), torch.cat(outputs, dim=1), dict(condition))


def call(network: nn.Module, plan: SamplingPlan, i: int, x: Tensor, condition: Condition = NOTHING) -> Tensor:
    """The network's output at row i of the plan for latent x (B, C, H, W) under a condition with B rows."""
    step = plan.steps[i]
    t = torch.full((x.shape[0],), step.timestep, dtype=torch.float32, device=x.device)
    return network(x if step.input_scale == 1.0 else x * step.input_scale, t, **condition)


def psnr(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture, (N, C, H, W) in [-1, 1] after clipping: peak 2."""
    a, b = (np.clip(x, -1, 1).reshape(len(x), -1).astype(np.float64) for x in (reference, other))
    mse = np.square(a - b).mean(axis=1)
    return 10 * np.log10(4.0 / np.maximum(mse, 1e-12))
