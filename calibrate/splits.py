"""Convolutions that read a concatenation: where its two parts meet.

A U-Net's shortcut convolution reads [h, skip], two tensors of different origin and range; one scale for both wastes
codes on the narrower one. Such a convolution is quantized in two parts, each with a scale of its own:

    w * [a, b] = w_a * a + w_b * b

The parts are found by looking: one pass of the network, in which every concatenation of two tensors on the channel axis
is remembered and compared with what the convolutions receive.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .trajectory import NOTHING, Condition


class _Concatenations(TorchFunctionMode):
    """Remembers the results of torch.cat over two tensors on axis 1, alive, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            parts = args[0] if args else kwargs["tensors"]
            axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if len(parts) == 2 and result.ndim == 4 and axis in (1, -3):
                self.seen[id(result)] = (result, parts[0].shape[1])
        return result


@torch.no_grad()
def find_splits(network: nn.Module, sample_shape: tuple[int, ...], condition: Condition = NOTHING) -> dict[str, int]:
    """For every Conv2d that reads a concatenation of two tensors directly, the channels of the first.

    Grouped convolutions are left out: their channels do not add up over the parts.
    """
    device = next(network.parameters()).device
    found: dict[str, int] = {}
    with _Concatenations() as concatenations:

        def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                if id(inputs[0]) in concatenations.seen:
                    found[name] = concatenations.seen[id(inputs[0])][1]

            return hook

        handles = [
            module.register_forward_pre_hook(look(name))
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d) and module.groups == 1
        ]
        try:
            given = {name: value[:1].to(device) for name, value in condition.items()}
            network(torch.zeros(1, *sample_shape, device=device), torch.zeros(1, device=device), **given)
        finally:
            for handle in handles:
                handle.remove()
    return found
