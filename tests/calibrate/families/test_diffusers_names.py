"""One U-Net under two layouts' names: diffusers' own network, renamed, computes the same."""

import numpy as np
import pytest
import torch
from accuquant.calibrate.families.adm_unet import AdmConfig, AdmUNet
from accuquant.calibrate.families.diffusers_names import renamed, unet_names
from diffusers import UNet2DConditionModel


@pytest.mark.parametrize("attention", [(0, 1), (1, 2)])
def test_diffusers_own_network_renamed_computes_the_same(attention, formula):
    """Three levels of two blocks, so that every rule of counting is used; the deepest with attention and without."""
    down = ["CrossAttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(3)]
    theirs = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64, 64),
        down_block_types=down, up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        attention_head_dim=4, cross_attention_dim=24, use_linear_projection=1 in attention,
    )  # fmt: skip
    weights = formula.formula_weights(theirs.state_dict())
    theirs.load_state_dict(weights)
    config = AdmConfig(
        4, 4, 32, (1, 2, 2), 2, attention, heads=4, resblock_updown=False, scale_shift_norm=False, context=24,
        linear_projection=1 in attention,
    )  # fmt: skip
    ours = AdmUNet(config)
    names = {there: here for here, there in unet_names(3, 2, attention).items()}
    ours.load_state_dict({renamed(key, names): value for key, value in weights.items()})
    x, context, t = formula.formula_input((2, 4, 8, 8)), formula.formula_input((2, 5, 24)), torch.tensor([0.0, 617.0])
    with torch.no_grad():
        expected, made = theirs.eval()(x, t, context).sample, ours.eval()(x, t, context=context)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4)


def test_a_name_that_is_not_known_has_no_other():
    assert renamed("add_embedding.linear_1.weight", unet_names(2, 1, (0,))) is None
