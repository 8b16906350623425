"""Classifier-free guidance, as part of what is simulated (Ho and Salimans, 2022).

    o = o_0 + g (o_c - o_0),        o_c = f(x, t; c),  o_0 = f(x, t; nothing)

Both outputs come from one call of twice the batch, as an engine makes it. The objective sees the guided output: errors
of both halves, amplified by g and g - 1, are what sampling accumulates.
"""

import torch
from torch import Tensor, nn

from .trajectory import Condition


class Guided(nn.Module):
    """A network (x, t, **condition) that gives its guided output; `null` holds one row (1, ...) for every input."""

    def __init__(self, network: nn.Module, null: Condition, guidance: float) -> None:
        super().__init__()
        self.network, self.guidance = network, guidance
        self.null = dict(null)

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), condition (B, ...) by the names of `null`."""
        both = {
            name: torch.cat([value, self.null[name].to(value).expand_as(value)]) for name, value in condition.items()
        }
        wanted, free = self.network(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return free + self.guidance * (wanted - free)


def unguided(network: nn.Module) -> nn.Module:
    """The network itself, which a graph holds: of a guided one the network inside."""
    return network.network if isinstance(network, Guided) else network
