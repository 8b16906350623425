"""Learned rounding starts at the nearest code and never leaves the two neighbours."""

import math

import pytest
import torch
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.observers import max_weight_scale, mse_weight_scale
from accuquant.calibrate.rounding import WeightQuantizer, annealed_beta, training_codes

LEARNED = ["adaround", "offset"]


def quantizer(rounding: str, bits: int = 4, pick=mse_weight_scale, shape=(8, 4, 3, 3)) -> WeightQuantizer:
    grid = Grid(bits, signed=True, symmetric=True)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = WeightQuantizer(weight, grid)
    made.set_scale(pick(weight, grid))
    made.learn(rounding)
    return made


@pytest.mark.parametrize("rounding", LEARNED)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pick", [mse_weight_scale, max_weight_scale])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 32)])
def test_starts_at_rounding_to_nearest(rounding, bits, pick, shape):
    learned, nearest = quantizer(rounding, bits, pick, shape), quantizer("nearest", bits, pick, shape)
    assert torch.equal(learned.codes(), nearest.codes())
    assert learned.codes().dtype == torch.int8
    assert torch.equal(learned().detach(), nearest())  # hard outside training


@pytest.mark.parametrize("rounding", LEARNED)
@pytest.mark.parametrize("seed", range(3))
def test_only_the_two_neighbours_can_be_chosen(rounding, seed):
    q = quantizer(rounding)
    with torch.no_grad():
        q.choice.add_(torch.randn(q.choice.shape, generator=torch.Generator().manual_seed(seed)) * 5)
    q.project()
    v = (q.weight / q.scale).clamp(q.grid.q_min, q.grid.q_max)
    codes = q.codes().float()
    assert ((codes == v.floor()) | (codes == v.ceil())).all()
    assert (codes != torch.round(v)).any()
    assert (codes == torch.round(v)).any()
    assert codes.min() >= q.grid.q_min
    assert codes.max() <= q.grid.q_max


@pytest.mark.parametrize("rounding", LEARNED)
def test_what_is_trained_hard_is_what_is_stored(rounding):
    q = quantizer(rounding)
    with torch.no_grad():
        q.choice.add_(torch.randn(q.choice.shape, generator=torch.Generator().manual_seed(0)))
    q.project()
    assert torch.equal(q().detach(), q.codes().float())


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_regulariser_is_zero_once_every_choice_is_made(beta):
    q = quantizer("adaround")
    assert float(q.regulariser(beta).detach()) > 0.1
    with torch.no_grad():
        q.choice.copy_(torch.where(q.choice > 0, 30.0, -30.0))
    assert float(q.regulariser(beta).detach()) == 0
    with torch.no_grad():
        q.choice.zero_()
    assert float(q.regulariser(beta).detach()) == pytest.approx(1)


def test_soft_weights_start_as_the_float_weight():
    """Inside the grid; the fraction is kept 1e-4 of a code away from its ends so that its logit is finite."""
    q = quantizer("adaround", pick=max_weight_scale)
    q.soft = True
    inside = (q.weight / q.scale).clamp(q.grid.q_min, q.grid.q_max) == q.weight / q.scale
    assert inside.float().mean() > 0.99
    assert ((q() * q.scale - q.weight).abs() <= 1.1e-4 * q.scale)[inside].all()


def test_soft_weights_become_hard_as_the_choices_do():
    q = quantizer("adaround")
    with torch.no_grad():
        q.choice.copy_(torch.where(q.choice > 0, 30.0, -30.0))
    q.soft = True
    assert torch.equal(q().detach(), q.codes().float())


def test_gradient_reaches_every_offset_inside_the_grid():
    q = quantizer("offset", pick=mse_weight_scale)
    q().sum().backward()
    v = torch.round(q.weight / q.scale)
    inside = (v >= q.grid.q_min) & (v <= q.grid.q_max)
    assert (q.choice.grad[inside] == 1).all()
    assert (q.choice.grad[~inside] == 0).all()
    assert (~inside).any()


def test_gradient_reaches_adarounds_variable_only_while_soft():
    q = quantizer("adaround", pick=max_weight_scale)
    q.soft = True
    q().sum().backward()
    slope = 1.2 * torch.sigmoid(q.choice) * (1 - torch.sigmoid(q.choice))
    moving = q.choice.grad != 0
    assert moving.float().mean() > 0.95
    torch.testing.assert_close(q.choice.grad[moving], slope.detach()[moving])
    q.soft = False
    assert not q().requires_grad


def test_nearest_has_nothing_to_learn():
    q = quantizer("nearest")
    assert q.choice is None
    assert list(q.parameters()) == []


@pytest.mark.parametrize("rounding", LEARNED)
def test_the_float_weight_stays_as_it_was(rounding):
    q = quantizer(rounding)
    before = q.weight.clone()
    q().sum()
    q.project()
    assert torch.equal(q.weight, before)
    assert not q.weight.requires_grad


def test_beta_is_off_through_the_warm_up_and_then_falls_from_20_to_2():
    assert math.isinf(annealed_beta(0.0))
    assert math.isinf(annealed_beta(0.199))
    betas = [annealed_beta(p) for p in (0.2, 0.3, 0.5, 0.8, 1.0)]
    assert betas[0] == pytest.approx(20)
    assert betas[-1] == pytest.approx(2)
    assert betas == sorted(betas, reverse=True)


@pytest.mark.parametrize("rounding", ["nearest", "offset"])
def test_learned_scale_has_the_gradient_of_lsq(rounding):
    """dQ/dg = s (q - (w/s + d)) inside the grid, s q outside; and the start is the scale that was set."""
    q = quantizer(rounding, pick=mse_weight_scale).double()
    q.learn(rounding, scale=True)
    assert torch.equal(q.scale, q.start)
    given = torch.randn(q.weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with training_codes([q]):
        (q() * q.scale * given).sum().backward()
    v = q.weight / q.start
    codes = torch.round(v).clamp(q.grid.q_min, q.grid.q_max)
    inside = torch.round(v) == codes
    wanted = (given * q.start * torch.where(inside, codes - v, codes)).flatten(1).sum(1)
    torch.testing.assert_close(q.gain.grad.flatten(), wanted)


def test_a_learned_scale_rounds_anew_and_is_what_is_stored():
    q = quantizer("offset", pick=max_weight_scale)
    q.learn("offset", scale=True)
    before = q.codes()
    with torch.no_grad():
        q.gain.fill_(-0.5)
    torch.testing.assert_close(q.scale, q.start * 0.6065, rtol=1e-4, atol=0)
    assert not torch.equal(q.codes(), before)
    assert torch.equal(q.codes(), torch.round(q.weight / q.scale).clamp(q.grid.q_min, q.grid.q_max).to(torch.int8))
