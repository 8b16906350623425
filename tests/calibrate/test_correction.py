"""The output's correction: least squares, what it can make up for exactly, where it is in force, and its judge."""

from types import SimpleNamespace

import pytest
import torch
from accuquant.calibrate.correction import OutputCorrection, correct, fit, least_squares
from accuquant.calibrate.guard import held_out_error
from accuquant.calibrate.guidance import Guided
from accuquant.calibrate.layers import quantization
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from torch import nn

SHAPE = (2, 4, 4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Distorted(nn.Module):
    """A denoiser that is weak, leans towards its input and is too bright, by the timestep, while its operator is on."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.operator = inner, SimpleNamespace(active=False, compute=torch.float32)

    @property
    def operators(self):
        return {"all": self.operator}

    def forward(self, x, t):
        output = self.inner(x, t)
        if not self.operator.active:
            return output
        by = (0.01 + t / 2000)[:, None, None, None]
        return output * (1 - by) + 0.3 * by * x + by * torch.tensor([0.2, -0.1])[:, None, None]


def test_least_squares_is_that_of_the_written_out_columns():
    o, x, r = (normal(5, 2, 3, 3, seed=seed) for seed in range(3))
    r = r + 0.3 * o - 0.2 * x + torch.tensor([1.0, -2.0])[:, None, None]
    channels = torch.eye(2)[None, :, :, None, None].expand(5, 2, 2, 3, 3)
    columns = torch.stack([o, x, channels[:, :, 0], channels[:, :, 1]], -1).reshape(-1, 4).double()
    wanted = torch.linalg.lstsq(columns, r.reshape(-1, 1).double()).solution[:, 0].float()
    assert torch.allclose(least_squares(o, x, r), wanted, atol=1e-6)


def test_least_squares_of_one_direction_is_finite_and_as_good():
    """At the chain's beginning a prediction of noise is its input: alpha and beta cannot be told apart."""
    x = normal(5, 2, 3, 3)
    found = least_squares(x, x, 0.5 * x)
    assert torch.allclose(found, torch.tensor([0.25, 0.25, 0.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta1", "plms", "heun", "unipc", "dpm++2m"])
def test_what_is_alike_in_all_pictures_is_made_up_for_wholly(tiny, sampler):
    """Also where outputs are read again by later rows, or timesteps are visited twice; on seeds of its own."""
    plan, network = trace(sampler, tiny.NOISE_SCHEDULE, 8), Distorted(tiny.Toy(0))
    operators = network.operators
    teacher, held_out = (simulate(network, plan, range(first, first + 6), SHAPE) for first in (0, 100))

    before = held_out_error(network, operators, plan, held_out)
    found, after = correct(network, operators, plan, teacher, held_out, 4, before)
    assert found is not None
    assert len(found.timesteps) == len(plan.timesteps)
    assert after < 1e-6 * before
    assert held_out_error(network, operators, plan, held_out) == after  # it is attached


def test_it_is_in_force_where_quantizers_are_and_nowhere_else(tiny):
    network = Distorted(tiny.Toy(0))
    x, t = normal(3, *SHAPE), torch.tensor([0.0, 20.0, 70.0])
    correction = OutputCorrection(torch.tensor([10.0, 60.0]), normal(2, 4))
    plain = network(x, t)
    with quantization(network.operators, active=True):
        low = network(x, t)
    attached = correction.attach(network, network.operators)
    assert torch.equal(network(x, t), plain)
    with quantization(network.operators, active=True):
        assert torch.equal(network(x, t), correction(x, t, low))
    attached.remove()
    with quantization(network.operators, active=True):
        assert torch.equal(network(x, t), low)
    # Every sample has the coefficients of the timestep next to its own.
    for sample, channel, row in ((1, 0, 0), (2, 1, 1)):
        alpha, beta, *gamma = correction.coefficients[row]
        wanted = (1 + alpha) * low[sample, channel] + beta * x[sample, channel] + gamma[channel]
        assert torch.allclose(correction(x, t, low)[sample, channel], wanted, atol=1e-5)


def test_correcting_both_halves_of_a_guided_output_corrects_the_whole(tiny):
    class Heard(Distorted):
        def forward(self, x, t, label):
            return super().forward(x + label[:, :, None, None], t)

    inner = Heard(tiny.Toy(0))
    guided = Guided(inner, {"label": torch.zeros(1, 2)}, 5.0)
    x, t, label = normal(3, *SHAPE), torch.full((3,), 40.0), normal(3, 2)
    correction = OutputCorrection(torch.tensor([40.0]), normal(1, 4))
    with quantization(inner.operators, active=True):
        whole = correction(x, t, guided(x, t, label=label))
        correction.attach(guided, inner.operators)
        assert torch.allclose(guided(x, t, label=label), whole, atol=1e-4)


def test_a_correction_that_does_not_help_is_taken_back(tiny):
    plan, network = trace("ddim", tiny.NOISE_SCHEDULE, 4), Distorted(tiny.Toy(0))
    teacher = simulate(network, plan, range(4), SHAPE)
    found, error = correct(network, network.operators, plan, teacher, teacher, 4, 0.0)
    assert found is None
    assert error == 0.0
    assert not network._forward_hooks


@pytest.mark.parametrize("count", [0, 4])
def test_calibration_corrects_where_it_helps_and_says_by_how_much(tiny, tmp_path, count):
    outcome = tiny.prepare(iterations=2, correct=count).start(tmp_path)
    if count == 0:
        assert outcome.begun == f"{outcome.initial:.2e} at the start"
        assert outcome.correction is None
        assert outcome.uncorrected is None
        return
    assert outcome.uncorrected is not None
    assert outcome.initial <= outcome.uncorrected
    assert (outcome.correction is None) == (outcome.initial == outcome.uncorrected)
    assert ("corrected by timestep" in outcome.begun) == (outcome.correction is not None)


def test_a_fit_is_the_same_in_any_run(tiny):
    plan, network = trace("ddim", tiny.NOISE_SCHEDULE, 4), Distorted(tiny.Toy(0))
    teacher = simulate(network, plan, range(4), SHAPE)
    first, second = (fit(network, network.operators, plan, teacher, 3) for _ in range(2))
    assert torch.equal(first.coefficients, second.coefficients)
