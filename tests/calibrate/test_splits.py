"""Finding the convolutions that read a concatenation, and quantizing them in two parts."""

import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.layers import QuantizedConv2d
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.splits import find_splits
from accuquant.runtime.errors import AccuQuantError
from torch import nn


class Skips(nn.Module):
    """A convolution of a concatenation, one of a sum, one of a concatenation in space, and one behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 1)
        self.joined = nn.Conv2d(5, 2, 1)
        self.keyword = nn.Conv2d(5, 2, 1)
        self.tall = nn.Conv2d(3, 2, 1)
        self.grouped = nn.Conv2d(6, 6, 1, groups=3)
        self.normed = nn.Conv2d(5, 2, 1)
        self.norm = nn.GroupNorm(1, 5)

    def forward(self, x, t):
        h = self.first(x)
        both = torch.cat([h, x], dim=1)
        self.tall(torch.cat([h, h], 2))
        self.grouped(torch.cat([h, h], 1))
        self.normed(self.norm(both))
        return self.joined(both) + self.keyword(torch.cat(tensors=[x, h], dim=1))


def test_concatenations_on_channels_are_found_and_no_others():
    network = Skips()
    assert find_splits(network, (2, 4, 4)) == {"joined": 3, "keyword": 2}
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_shortcuts_of_the_up_path(tiny):
    """Every block on the way up reads [h, skip]; its 3x3 convolutions see it through a norm, its shortcut directly."""
    found = find_splits(tiny.unet(), tiny.SHAPE)
    assert set(found) == {f"up.{level}.block.{k}.nin_shortcut" for level in (0, 1) for k in (0, 1)}
    assert all(0 < width < 128 for width in found.values())


def test_each_part_has_its_own_scale():
    """Two parts of very different range: one scale drowns the small part, two keep both to the grid's error."""
    generator = torch.Generator().manual_seed(0)
    grid = Grid(8, signed=True, symmetric=True)
    conv = nn.Conv2d(4, 3, 1)
    x = torch.cat(
        [torch.randn(2, 2, 5, 5, generator=generator), 1e-2 * torch.randn(2, 2, 5, 5, generator=generator)], 1
    )
    with torch.no_grad():
        # Integers up to 127: exact on their own grid, so that the error is the activations' alone.
        conv.weight[:, :2] = torch.randint(1, 3, (3, 2, 1, 1), generator=generator).float()
        conv.weight[:, 2:] = 127
    wanted = conv(x).detach()

    def error(split):
        op = QuantizedConv2d("layer", "body", conv, grid, grid, split)
        for quantizer, part in zip(op.quantizers, op.parts((x,)), strict=True):
            quantizer.set(part.abs().amax() / 127, torch.tensor(0.0))
        op.weight_quantizer.set_scale(conv.weight.detach().abs().flatten(1).amax(1).view(3, 1, 1, 1) / 127)
        op.active = True
        return float((op(x) - wanted).detach().square().mean())

    assert error(2) < error(None) / 100


def test_a_split_where_nothing_is_joined_is_refused(tiny, tmp_path):
    model = load_model(tiny.save_class_checkpoint(tmp_path, 4))
    scheme = QuantScheme(weight_bits=8, activation_bits=8, split=True)
    with pytest.raises(AccuQuantError, match=r"--split: no convolution of the model \(.*leave --split out"):
        quantize(model, scheme)
