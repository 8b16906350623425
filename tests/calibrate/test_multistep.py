"""The multi-step gradient: equal to unrolled autograd where it claims to be, in the memory of one network call."""

import itertools
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from accuquant.calibrate.carry import carry
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.layers import quantization, quantize_operators
from accuquant.calibrate.multistep import (
    Group,
    GroupBatch,
    accumulate_gradient,
    cut,
    graph_bytes,
    history_needed,
    roll,
    unrolled_loss,
)
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import Trajectory, simulate, step_noise
from accuquant.runtime.plan import PlanStep, SamplingPlan
from torch import nn

GRADIENTS = ["exact", "injected-a", "injected-1", "injected-v", "measured"]
SHAPE = (2, 4, 4)


def plan_for(sampler: str, tiny, steps: int = 8) -> SamplingPlan:
    return trace(sampler, tiny.NOISE_SCHEDULE, steps)


def float64_data(plan: SamplingPlan, group: Group, seed: int = 0, batch: int = 3) -> GroupBatch:
    """Random ends, history and noise: the gradient's algebra must hold for any of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise = {j: draw(batch, *SHAPE) for j in range(len(plan))}
    history = {j: draw(batch, *SHAPE) for j in history_needed(plan, group)}
    between = {i: draw(batch, *SHAPE) for i in range(group.start + 1, group.stop)}
    return GroupBatch(draw(batch, *SHAPE), draw(batch, *SHAPE), history, noise.__getitem__, between)


def factors(plan: SamplingPlan, gradient: str, network: nn.Module) -> tuple[float, ...] | None:
    """The carried factors; "measured" gets random latents to measure on."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(plan) + 1, 4, *SHAPE, generator=generator, dtype=torch.float64)
    return carry(plan, gradient, network, Trajectory(tuple(range(4)), states, states[1:]))


def accumulate(network, plan, group, data, gradient, between=0.0, kept=1):
    return accumulate_gradient(network, plan, group, data, factors(plan, gradient, network), between, kept=kept).loss


def gradient_of(network: nn.Module, compute) -> tuple[float, torch.Tensor]:
    network.zero_grad(set_to_none=True)
    loss = compute()
    if loss.requires_grad:
        loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return float(loss.detach()), torch.cat([g.flatten() for g in parts])


def both(network, plan, group, data, gradient, between=0.0):
    mine = gradient_of(network, lambda: accumulate(network, plan, group, data, gradient, between))
    unrolled = gradient_of(network, lambda: unrolled_loss(network, plan, group, data, between))
    return mine, unrolled


def close(a, b, rtol):
    return (a - b).norm() <= rtol * b.norm()


@pytest.mark.parametrize(
    ("sampler", "group"),
    [
        ("ddim", Group(1, 5)),
        ("ddim", Group(0, 8)),
        ("ddim-eta1", Group(2, 7)),
        ("ddpm", Group(3, 8)),
        ("dpm++2m", Group(0, 4)),
        ("dpm++2m", Group(2, 6)),
        ("plms", Group(4, 8)),
        ("dpm++2m-sde", Group(2, 6)),
        ("heun", Group(3, 9)),
        ("euler", Group(2, 6)),
        ("unipc", Group(3, 8)),
    ],
)
def test_exact_equals_unrolled_autograd(tiny, sampler, group):
    plan = plan_for(sampler, tiny)
    network = tiny.Toy(0).double()
    (loss, mine), (wanted_loss, wanted) = both(network, plan, group, float64_data(plan, group), "exact")
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert wanted.norm() > 0
    assert close(mine, wanted, 1e-9)


def test_these_plans_do_look_back_across_the_groups_start(tiny):
    """Otherwise the test above would not show what it says."""
    assert history_needed(plan_for("plms", tiny), Group(4, 8))
    assert history_needed(plan_for("dpm++2m", tiny), Group(2, 6))
    assert history_needed(plan_for("ddim", tiny), Group(1, 5)) == []
    assert any(s.c for s in plan_for("ddim-eta1", tiny).steps)
    assert any(s.input_scale != 1 for s in plan_for("euler", tiny).steps)


@pytest.mark.parametrize("kept", [2, 5, 99])
def test_graphs_kept_from_the_first_pass_change_the_cost_alone(tiny, kept):
    """Loss and gradient to the bit, with `kept` calls fewer."""
    plan = plan_for("dpm++2m", tiny)
    network = Counting(tiny.Toy(0).double())
    group = Group(2, 7)
    data = float64_data(plan, group)

    def run(kept):
        network.calls, network.differentiated = 0, []
        return gradient_of(
            network, lambda: accumulate_gradient(network, plan, group, data, kept=kept).loss
        ), network.calls

    ((wanted_loss, wanted), all_calls), ((loss, mine), calls) = run(1), run(kept)
    assert loss == wanted_loss
    assert torch.equal(mine, wanted)
    assert all_calls == 2 * 5 - 1
    assert calls == 2 * 5 - min(kept, 5)


@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta1", "plms", "euler"])
def test_latents_inside_the_group_can_be_looked_at_too(tiny, sampler):
    """Loss and exact gradient with weight 0.3 on them equal the unrolled form's, and differ from the end's alone."""
    plan = plan_for(sampler, tiny)
    network = tiny.Toy(0).double()
    group = Group(2, 7)
    data = float64_data(plan, group)
    (loss, mine), (wanted_loss, wanted) = both(network, plan, group, data, "exact", between=0.3)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert close(mine, wanted, 1e-9)
    end_loss, end = gradient_of(network, lambda: accumulate(network, plan, group, data, "exact"))
    assert loss > end_loss
    assert not close(end, wanted, 1e-2)


def test_the_rollout_is_where_the_student_went(tiny):
    plan = plan_for("dpm++2m", tiny)
    network = tiny.Toy(0).double()
    group = Group(2, 6)
    data = float64_data(plan, group)
    latents, outputs = roll(network, plan, group, data)
    ended = accumulate_gradient(network, plan, group, data)
    assert torch.equal(ended.end, latents[-1])
    assert ended.outputs.keys() == set(range(2, 6))
    for j, output in ended.outputs.items():
        assert torch.equal(output, outputs[j])
        assert not output.requires_grad


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "plms", "ddim-eta1", "euler"])
@pytest.mark.parametrize("row", [0, 4])
def test_groups_of_one_row_have_one_gradient(tiny, sampler, row):
    """And it is the per-step loss's, weighted by b^2."""
    plan = plan_for(sampler, tiny)
    network = tiny.Toy(0).double()
    group = Group(row, row + 1)
    data = float64_data(plan, group)
    for gradient in GRADIENTS:
        (_, mine), (_, wanted) = both(network, plan, group, data, gradient)
        assert close(mine, wanted, 1e-12), gradient


@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta1", "dpm++2m", "plms"])
def test_injection_is_exact_for_a_network_that_ignores_the_latent(tiny, sampler):
    plan = plan_for(sampler, tiny)
    network = tiny.Toy(0, looks=False).double()
    group = Group(2, 8)
    (_, mine), (_, wanted) = both(network, plan, group, float64_data(plan, group), "injected-a")
    assert close(mine, wanted, 1e-12)


def test_injections_differ_from_the_exact_gradient_when_the_network_looks(tiny):
    plan = plan_for("ddim", tiny)
    network = tiny.Toy(0).double()
    data = float64_data(plan, Group(0, 8))
    exact, with_a, with_1 = (
        gradient_of(network, lambda g=g: accumulate(network, plan, Group(0, 8), data, g))[1] for g in GRADIENTS[:3]
    )
    assert not close(with_a, exact, 1e-3)
    assert not close(with_1, exact, 1e-3)
    assert not close(with_1, with_a, 1e-3)
    # Still the same direction, roughly: that is why the paper's approximation works.
    assert torch.cosine_similarity(with_a, exact, dim=0) > 0.8


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler"])
@pytest.mark.parametrize("width", [1, 3, 7, 100])
def test_rows_that_share_a_call_have_the_gradient_of_rows_alone(tiny, sampler, width):
    """Three samples, six rows: one, one, two or all rows to a call."""
    plan = plan_for(sampler, tiny)
    network = Counting(tiny.Toy(0).double())
    group = Group(2, 8)
    data = float64_data(plan, group)
    weights = factors(plan, "injected-v", network)

    def gradient(width):
        network.differentiated = []
        return gradient_of(network, lambda: accumulate_gradient(network, plan, group, data, weights, 0.3, width).loss)

    (wanted_loss, wanted), (loss, mine) = gradient(0), gradient(width)
    assert loss == wanted_loss
    assert close(mine, wanted, 1e-12)
    rows = sum(any(j in s.b for s in plan.steps[2:8]) for j in range(2, 8))
    assert sum(network.differentiated) == 3 * rows
    assert max(network.differentiated) == min(3 * rows, max(3, width // 3 * 3))


class Counting(nn.Module):
    """Notes the batch size of every call that is made with gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.differentiated: list[int] = []
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        if torch.is_grad_enabled():
            self.differentiated.append(len(x))
        return self.network(x, t)


class PerRow(nn.Module):
    """theta[row] plus a function of x: the gradient at theta[k] shows the weight with which row k sees the residual."""

    def __init__(self, timesteps: list[float]) -> None:
        super().__init__()
        self.rows = {t: i for i, t in enumerate(timesteps)}
        self.theta = nn.Parameter(torch.zeros(len(timesteps), dtype=torch.float64))

    def forward(self, x, t):
        rows = [self.rows[float(value)] for value in t]
        return self.theta[rows][:, None, None, None] + torch.sin(x)


@pytest.mark.parametrize("gradient", ["injected-a", "injected-1"])
def test_carried_weight_in_closed_form(tiny, gradient):
    """DDIM: dL/dtheta_k = 2 mean(r) b_k c_k with c_k = sqrt(abar_M / abar_k) ("a"), or c_k = 1."""
    plan = plan_for("ddim", tiny)
    group = Group(1, 7)
    data = float64_data(plan, group)
    network = PerRow([s.timestep for s in plan.steps])
    loss = accumulate(network, plan, group, data, gradient)
    residual = roll(network, plan, group, data)[0][-1] - data.end
    assert float(loss) == pytest.approx(float(residual.square().mean()))
    betas = torch.linspace(1e-4, 0.02, 100, dtype=torch.float32)
    abar = torch.cumprod(1 - betas, 0).double().numpy()
    after = np.append(abar[[int(s.timestep) for s in plan.steps[1:]]], 1.0)  # abar of the latent that row k leaves
    for k in range(group.start, group.stop):
        c = np.sqrt(after[group.stop - 1] / after[k]) if gradient == "injected-a" else 1.0
        wanted = 2 * float(residual.mean()) * plan.steps[k].b[k] * c
        assert float(network.theta.grad[k]) == pytest.approx(wanted, rel=1e-6)
    outside = [k for k in range(len(plan)) if not group.start <= k < group.stop]
    assert (network.theta.grad[outside] == 0).all()


def test_gradients_accumulate_over_groups(tiny):
    plan = plan_for("ddim", tiny)
    network = tiny.Toy(0).double()
    groups = cut(plan, 4)
    parts = [
        gradient_of(network, lambda g=g: accumulate(network, plan, g, float64_data(plan, g), "exact"))[1]
        for g in groups
    ]
    network.zero_grad()
    for g in groups:
        accumulate(network, plan, g, float64_data(plan, g), "exact")
    total = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert close(total, torch.stack(parts).sum(0), 1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta1", "plms", "dpm++2m"])
def test_bypassed_quantizers_follow_the_teacher_exactly(tiny, sampler):
    """Student and teacher share weights and noise; with quantization off every group ends at zero error, to the bit."""
    network = tiny.unet()
    plan = plan_for(sampler, tiny)
    seeds = [3, 5, 8]
    teacher = simulate(network, plan, seeds, tiny.SHAPE)
    operators = quantize_operators(network, QuantScheme(weight_bits=4, activation_bits=8), role_of)
    for group in cut(plan, 3):
        data = GroupBatch(
            teacher.states[group.start],
            teacher.states[group.stop],
            {j: teacher.outputs[j] for j in history_needed(plan, group)},
            lambda j: step_noise(seeds, j, tiny.SHAPE, "cpu"),
        )
        assert float(unrolled_loss(network, plan, group, data)) == 0.0
        latents, _ = roll(network, plan, group, data)
        assert len(latents) == len(group) + 1
        for k, x in enumerate(latents):
            assert torch.equal(x, teacher.states[group.start + k])
        with quantization(operators, active=True), torch.no_grad():
            assert float(unrolled_loss(network, plan, group, data)) > 0.0


def test_trajectory_does_not_depend_on_the_batch(tiny):
    """Up to float32's rounding: convolutions may be summed in another order for another batch size."""
    network, plan = tiny.unet(), plan_for("ddim-eta1", tiny)
    whole = simulate(network, plan, range(5), tiny.SHAPE, batch=5)
    parts = simulate(network, plan, range(5), tiny.SHAPE, batch=2)
    assert whole.seeds == parts.seeds == tuple(range(5))
    assert whole.states.shape == (len(plan) + 1, 5, *tiny.SHAPE)
    torch.testing.assert_close(whole.states, parts.states, rtol=1e-4, atol=1e-4)


def test_trajectory_equals_the_runtimes_sampling_loop(tiny):
    """One plan, two loops: torch's simulation and numpy's sampler give the same pictures."""
    network, plan = tiny.unet(), plan_for("dpm++2m-sde", tiny)
    run = simulate(network, plan, [4, 9], tiny.SHAPE)
    with torch.no_grad():
        got = plan.sample(
            lambda x, t: network(torch.from_numpy(x), torch.full((2,), t)).numpy(),
            lambda j: step_noise([4, 9], j, tiny.SHAPE, "cpu").numpy(),
        )
    np.testing.assert_allclose(got, run.states[-1].numpy(), rtol=1e-4, atol=1e-4)


def test_trajectory_round_trip(tiny, tmp_path):
    run = simulate(tiny.unet(), plan_for("ddim", tiny, 3), [2**40, 7], tiny.SHAPE)
    run.save(tmp_path / "teacher.safetensors")
    again = type(run).load(tmp_path / "teacher.safetensors")
    assert again.seeds == run.seeds
    assert torch.equal(again.states, run.states)
    assert torch.equal(again.outputs, run.outputs)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_groups_cover_every_row_once(tiny, size):
    plan = plan_for("ddim", tiny)
    groups = cut(plan, size)
    assert [i for g in groups for i in range(g.start, g.stop)] == list(range(len(plan)))
    assert all(len(g) == size for g in groups[:-1])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_idle_rows_fill_no_group(size):
    """A repeated timestep gives a = 1, b = 0: x stays as it is, and there is nothing to learn."""
    idle = {0, 3, 4, 7}
    steps = [PlanStep(timestep=i, a=1.0 if i in idle else 1.1, b={} if i in idle else {i: -0.1}) for i in range(8)]
    steps[3] = PlanStep(timestep=3, a=1.0, b={3: 0.0})
    plan = SamplingPlan(sampler="Hand", prediction_type="epsilon", init_sigma=1.0, steps=tuple(steps))
    groups = cut(plan, size)
    covered = [i for g in groups for i in range(g.start, g.stop) if i not in idle]
    assert covered == [1, 2, 5, 6]
    for g in groups:
        assert g.start not in idle
        assert g.stop - 1 not in idle
        assert sum(i not in idle for i in range(g.start, g.stop)) <= size
    assert all(a.stop <= b.start for a, b in itertools.pairwise(groups))


def test_idle_rows_leave_the_latent_unchanged(tiny):
    network = tiny.Toy(0).double()
    plan = SamplingPlan(
        sampler="Hand",
        prediction_type="epsilon",
        init_sigma=1.0,
        steps=(PlanStep(timestep=1, a=1.1, b={0: -0.1}), PlanStep(timestep=1, a=1.0, b={})),
    )
    latents, _ = roll(network, plan, Group(0, 2), float64_data(plan, Group(0, 2)))
    assert torch.equal(latents[1], latents[2])


class Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class LiveBytes:
    """Peak of the bytes that autograd graphs keep, parameters excepted."""

    def __init__(self, network: nn.Module) -> None:
        tensors = [*network.parameters(), *network.buffers()]
        self.known = {t.untyped_storage().data_ptr() for t in tensors}
        self.now = self.peak = 0

    def release(self, size: int) -> None:
        self.now -= size

    def pack(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        if tensor.untyped_storage().data_ptr() not in self.known:
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self.release, size)
        return held

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_memory_is_flat_in_the_groups_length(tiny):
    """16 rows take no more than one (within 10 %); the unrolled graph takes one network for each."""
    network = tiny.unet()
    plan = plan_for("ddim", tiny, 16)
    operators = quantize_operators(network, QuantScheme(weight_bits=4, activation_bits=8), role_of)
    for operator in operators.values():
        for quantizer in operator.inputs:
            quantizer.set(torch.tensor(0.05), torch.tensor(0.0))
    x = torch.randn(2, *tiny.SHAPE, generator=torch.Generator().manual_seed(0))

    def peak(rows, compute):
        data = GroupBatch(x, torch.zeros_like(x), {}, lambda j: torch.zeros_like(x))
        with quantization(operators, active=True), LiveBytes(network) as live:
            loss = compute(network, plan, Group(0, rows), data)
            if loss.requires_grad:
                loss.backward()
        del loss
        assert live.now == 0
        return live.peak

    for gradient in GRADIENTS[:-1]:  # measuring is done before, once
        mine = partial(accumulate, gradient=gradient)
        assert peak(16, mine) <= 1.1 * peak(1, mine), gradient
    assert peak(16, unrolled_loss) > 8 * peak(1, unrolled_loss)
    one = peak(1, mine)
    assert peak(16, partial(accumulate, gradient="exact", kept=4)) == pytest.approx(4 * one, rel=0.1)
    with quantization(operators, active=True):
        assert graph_bytes(network, plan, x) == pytest.approx(one, rel=0.1)
