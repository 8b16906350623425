"""Conditions and classifier-free guidance, from the trajectory to the gradient."""

import pytest
import torch
from accuquant.calibrate.batches import Batches
from accuquant.calibrate.carry import carry
from accuquant.calibrate.estimate import Estimate, estimate
from accuquant.calibrate.guidance import Guided
from accuquant.calibrate.journal import Journal
from accuquant.calibrate.layers import QuantizedOperator, quantize_operators
from accuquant.calibrate.multistep import Group, GroupBatch, accumulate_gradient, cut, unrolled_loss
from accuquant.calibrate.optimize import calibrate
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import CalibrationSpec
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import Trajectory, call, simulate
from torch import nn

NULL = {"label": torch.zeros(1, 3)}


class Conditional(nn.Module):
    """A denoiser that also listens to a label (B, 3)."""

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner, self.hear = inner, nn.Linear(3, channels)
        with torch.no_grad():
            for p in self.hear.parameters():
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(5))
        self.hear.requires_grad_(False)
        self.batches: list[int] = []

    def forward(self, x, t, label):
        self.batches.append(len(x))
        return self.inner(x + self.hear(label)[:, :, None, None], t)


def labels(n, dtype=torch.float32):
    return {"label": torch.randn(n, 3, generator=torch.Generator().manual_seed(3), dtype=dtype)}


def toy(tiny, guidance):
    network = Conditional(tiny.Toy(0), 2).double()
    return network if guidance is None else Guided(network, {"label": NULL["label"].double()}, guidance)


def data(plan, group, n=3):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)

    noise = {j: draw() for j in range(len(plan))}
    history = {j: draw() for j in range(group.start)}
    return GroupBatch(draw(), draw(), history, noise.__getitem__, condition=labels(n, torch.float64))


def gradient(network, compute):
    network.zero_grad(set_to_none=True)
    loss = compute()
    if loss.requires_grad:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("guidance", [None, 1.0, 7.5])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "ddim-eta1"])
def test_the_exact_gradient_under_guidance_is_unrolled_autograd(tiny, sampler, guidance):
    plan, group = trace(sampler, tiny.NOISE_SCHEDULE, 8), Group(3, 7)
    network, given = toy(tiny, guidance), data(plan, group)
    mine = gradient(network, lambda: accumulate_gradient(network, plan, group, given, kept=2).loss)
    wanted = gradient(network, lambda: unrolled_loss(network, plan, group, given))
    assert wanted.norm() > 0
    assert (mine - wanted).norm() <= 1e-9 * wanted.norm()


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_rows_that_share_a_call_keep_their_conditions(tiny, guidance):
    plan, group = trace("ddim", tiny.NOISE_SCHEDULE, 8), Group(2, 7)
    network, given = toy(tiny, guidance), data(plan, group)
    factors = carry(plan, "injected-a", network, Trajectory((), given.start, given.start))
    apart, together = (
        gradient(network, lambda w=w: accumulate_gradient(network, plan, group, given, factors, width=w).loss)
        for w in (1, 15)
    )
    assert (apart - together).norm() <= 1e-9 * apart.norm()


def test_the_measured_factor_is_that_of_the_conditions_of_its_latents(tiny):
    """Under another condition the Jacobian is another; under a guidance of zero the label does not matter."""
    plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)

    def measured(network, shift):
        states = torch.randn(5, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        condition = {"label": labels(4, torch.float64)["label"] + shift}
        return carry(plan, "measured", network, Trajectory((0, 1, 2, 3), states, states[1:], condition))

    assert measured(toy(tiny, None), 0.0) != pytest.approx(measured(toy(tiny, None), 2.0), rel=1e-3)
    assert measured(toy(tiny, 0.0), 0.0) == pytest.approx(measured(toy(tiny, 0.0), 2.0), rel=1e-12)


def test_guidance_is_one_call_of_twice_the_batch_between_and_beyond_both_outputs(tiny):
    inner = Conditional(tiny.Toy(0), 2)
    x, t, given = torch.randn(3, 2, 4, 4), torch.full((3,), 20.0), labels(3)
    with torch.no_grad():
        conditional, free = inner(x, t, **given), inner(x, t, label=NULL["label"].expand(3, 3))
        inner.batches.clear()
        for guidance in (0.0, 1.0, 7.5):
            got = Guided(inner, NULL, guidance)(x, t, **given)
            torch.testing.assert_close(got, free + guidance * (conditional - free), rtol=1e-5, atol=1e-6)
    assert inner.batches == [6, 6, 6]


def guided_run(tiny, tmp_path, resume=False, **settings):
    """A calibration of the tiny U-Net behind a label, guided."""
    spec = CalibrationSpec.model_validate(tiny.SMALL | settings)
    inner = Conditional(tiny.unet(), 1)
    network = Guided(inner, NULL, 3.0)
    plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)
    teacher, judge = (
        simulate(network, plan, range(first, first + n), tiny.SHAPE, labels(n))
        for first, n in ((0, spec.trajectories), (1000, spec.held_out))
    )
    operators = quantize_operators(network, QuantScheme(weight_bits=4, activation_bits=8), lambda _: "body")
    outcome = calibrate(network, operators, plan, teacher, judge, spec, Journal(tmp_path, {}), resume=resume)
    return outcome, operators


@pytest.mark.parametrize("settings", [{}, {"gradient": "injected-v"}, {"start": "student", "aim": "local"}])
def test_a_guided_model_calibrates(tiny, tmp_path, settings):
    outcome, operators = guided_run(tiny, tmp_path, iterations=12, **settings)
    assert outcome.best <= outcome.initial < 1
    assert all(isinstance(op, QuantizedOperator) and op.active for op in operators.values())
    assert "network.hear" in operators


def test_every_draw_brings_its_own_conditions(tiny):
    run = tiny.prepare()
    condition = {"label": torch.arange(8.0)[:, None].expand(8, 3)}
    teacher = Trajectory(run.teacher.seeds, run.teacher.states, run.teacher.outputs, condition)
    batches = Batches(run.network, run.operators, run.plan, teacher, cut(run.plan, 2), run.spec)
    for iteration in range(6):
        group, drawn = batches.draw(iteration)
        rows = [int(v) for v in drawn.condition["label"][:, 0]]
        torch.testing.assert_close(drawn.start, teacher.states[group.start, rows])


def test_chunks_of_a_conditional_chain_are_the_whole(tiny):
    network, plan = Conditional(tiny.Toy(0), 2), trace("ddim", tiny.NOISE_SCHEDULE, 4)
    whole = simulate(network, plan, range(5), (2, 4, 4), labels(5))
    parts = simulate(network, plan, range(5), (2, 4, 4), labels(5), batch=2)
    torch.testing.assert_close(parts.states, whole.states)
    other = simulate(network, plan, range(5), (2, 4, 4), {"label": labels(5)["label"] + 1})
    assert (other.states[-1] - whole.states[-1]).abs().max() > 1e-2
    with torch.no_grad():
        again = call(network, plan, 1, whole.states[1], labels(5))
    torch.testing.assert_close(again, whole.outputs[1])


def test_conditions_are_stored_with_their_trajectories(tiny, tmp_path):
    network, plan = Conditional(tiny.Toy(0), 2), trace("ddim", tiny.NOISE_SCHEDULE, 2)
    run = simulate(network, plan, range(3), (2, 4, 4), labels(3))
    run.save(tmp_path / "run.safetensors")
    again = Trajectory.load(tmp_path / "run.safetensors")
    assert torch.equal(again.condition["label"], run.condition["label"])
    assert torch.equal(again.states, run.states)


def test_the_estimate_counts_a_guided_call(tiny):
    """Twice the batch: about twice the graph that must be kept for its gradient."""
    plan = trace("ddim", tiny.NOISE_SCHEDULE, 4)
    spec = CalibrationSpec.model_validate(tiny.SMALL | {"group": 1})
    found = []
    for wrap in (lambda inner: inner, lambda inner: Guided(inner, NULL, 2.0)):
        network = wrap(Conditional(tiny.unet(), 1))
        operators = quantize_operators(network, QuantScheme(weight_bits=4, activation_bits=8), lambda _: "body")
        weights = 6 * sum(p.numel() * p.element_size() for p in network.parameters())
        found.append(estimate(network, operators, plan, spec, tiny.SHAPE, labels(1)).bytes - weights)
    assert found[1] == pytest.approx(2 * found[0], rel=0.2)


@pytest.mark.parametrize(("free", "short"), [(21, False), (20, True)])
def test_memory_that_is_short_is_said_with_the_plan(free, short):
    told = Estimate(seconds=90.0, bytes=int(20.5 * 2**30)).told(free * 2**30)
    assert told.startswith("about 1.5 min and 20.5 GiB")
    assert (f"{free}.0 GiB are free" in told) == short
