"""Block-wise reconstruction, the rival: every block learns its own output, in the order blocks run."""

import pytest
import torch
from accuquant.calibrate.blockwise import reconstruct
from accuquant.calibrate.families.ddim import block_of
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import quantization


@pytest.mark.parametrize(
    ("operator", "block"),
    [
        ("down.0.block.1.conv2", "down.0.block.1"),
        ("up.1.attn.0.qk", "up.1.attn.0"),
        ("mid.block_2.nin_shortcut", "mid.block_2"),
        ("mid.attn_1.proj_out", "mid.attn_1"),
        ("down.0.downsample.conv", "down.0.downsample.conv"),
        ("conv_in", "conv_in"),
        ("temb.dense.0", "temb.dense.0"),
    ],
)
def test_operators_belong_to_the_block_whose_output_judges_them(operator, block):
    assert block_of(operator) == block


def output_error(run) -> float:
    """Mean squared error of the network's output on held-out latents along the chain."""
    total = 0.0
    for i, step in enumerate(run.plan.steps):
        t = torch.full((len(run.judge.seeds),), step.timestep)
        with torch.no_grad(), quantization(run.operators, active=True):
            out = run.network(run.judge.states[i], t)
        total += float((out - run.judge.outputs[i]).square().mean())
    return total / len(run.plan)


def test_it_lowers_the_networks_error_and_leaves_everything_quantized(tiny):
    """30 iterations for every block take at least a tenth off the output's error."""
    settings = {"initialisation": "mse", "iterations": 30, "batch": 16, "trajectories": 16, "steps": 8}
    fixed, run = tiny.prepare(**settings), tiny.prepare(**settings)
    initialise(fixed.network, fixed.operators, fixed.plan, fixed.teacher, "mse")
    seen = []
    reconstruct(
        run.network, run.operators, run.plan, run.teacher, run.spec, block_of,
        report=lambda name, done, total: seen.append((name, done, total)),
    )  # fmt: skip
    assert output_error(run) < 0.9 * output_error(fixed)
    assert all(operator.active for operator in run.operators.values())
    order = [name for name, _, _ in seen]
    assert set(order) == {block_of(name) for name in run.operators}
    assert order.index("down.0.block.0") < order.index("mid.block_1") < order.index("up.0.block.0")
    assert [done for _, done, _ in seen] == list(range(1, len(order) + 1))


def test_it_repeats_itself(tiny):
    settings = {"iterations": 3, "steps": 4}
    one, two = tiny.prepare(**settings), tiny.prepare(**settings)
    for run in (one, two):
        reconstruct(run.network, run.operators, run.plan, run.teacher, run.spec, block_of)
    for name, value in one.learned().items():
        assert torch.equal(two.learned()[name], value), name
