"""The plan as a file, and the sampling loop that runs it."""

import weakref

import numpy as np
import pytest
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.plan import PlanStep, SamplingPlan
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

finite = st.floats(allow_nan=False, allow_infinity=False)


def plan_of(*steps: PlanStep, init_sigma: float = 1.0) -> SamplingPlan:
    return SamplingPlan(sampler="Hand", prediction_type="epsilon", init_sigma=init_sigma, steps=steps)


def two_step(rows: int) -> SamplingPlan:
    """Every row reads its own output and the one before."""
    return plan_of(
        *(
            PlanStep(timestep=rows - i, a=0.9, b={j: 0.1 for j in (i - 1, i) if j >= 0}, c={i: 0.05})
            for i in range(rows)
        )
    )


@st.composite
def plans(draw):
    rows = draw(st.integers(1, 5))
    steps = [
        PlanStep(
            timestep=draw(finite),
            input_scale=draw(finite),
            a=draw(finite),
            b=draw(st.dictionaries(st.integers(0, i), finite)),
            c=draw(st.dictionaries(st.integers(0, i), finite)),
        )
        for i in range(rows)
    ]
    return plan_of(*steps, init_sigma=draw(finite))


@given(plans())
def test_json_keeps_every_bit(plan):
    again = SamplingPlan.model_validate_json(plan.model_dump_json(indent=1))
    assert again == plan
    assert [s.a.hex() for s in again.steps] == [s.a.hex() for s in plan.steps]


def test_saved_plan_loads_equal(tmp_path):
    plan = two_step(4)
    plan.save(tmp_path / "plan.json")
    assert SamplingPlan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_unknown_keys_are_errors(tmp_path):
    plan = two_step(2)
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json().replace('"init_sigma"', '"guidance": 7.5, "init_sigma"'))
    with pytest.raises(AccuQuantError, match="guidance"):
        SamplingPlan.load(path)
    with pytest.raises(ValidationError, match="d"):
        PlanStep.model_validate({"timestep": 0, "a": 1, "b": {}, "d": {}})


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(two_step(2).model_dump_json().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(AccuQuantError, match="schema"):
        SamplingPlan.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00plan", b"null"])
def test_damaged_plan_is_a_user_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(AccuQuantError, match=r"plan\.json"):
        SamplingPlan.load(path)


def test_missing_plan_names_the_file(tmp_path):
    with pytest.raises(AccuQuantError, match=r"plan\.json is missing"):
        SamplingPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("wrong", [{"b": {1: 0.5}}, {"b": {}, "c": {1: 0.5}}, {"b": {-1: 0.5}}])
def test_rows_that_look_ahead_are_refused(wrong):
    with pytest.raises(ValidationError, match="row 0"):
        plan_of(PlanStep(timestep=0, a=1.0, **wrong), PlanStep(timestep=0, a=1.0, b={1: 1.0}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValidationError):
        PlanStep(timestep=0, a=value, b={})
    with pytest.raises(ValidationError):
        PlanStep(timestep=0, a=1.0, b={0: value})


def test_a_plan_has_at_least_one_row():
    with pytest.raises(ValidationError):
        plan_of()


def test_sample_is_the_recurrence():
    """x' = a x + sum b o + sum c z, against the sums written out, in float64."""
    plan = plan_of(
        PlanStep(timestep=9, input_scale=0.5, a=1.1, b={0: -0.3}, c={0: 0.2}),
        PlanStep(timestep=4, a=0.7, b={0: 0.1, 1: 0.4}, c={0: 0.3, 1: -0.6}),
        init_sigma=2.0,
    )
    rng = np.random.default_rng(0)
    z = {j: rng.standard_normal((2, 1, 3, 3)).astype(np.float32) for j in (-1, 0, 1)}
    seen = []

    def network(x, t):
        seen.append((x.dtype, t))
        return np.tanh(x) + np.float32(t / 10)

    got = plan.sample(network, z.__getitem__)
    x0 = 2.0 * z[-1].astype(np.float64)
    o0 = np.tanh(0.5 * x0) + 0.9
    x1 = 1.1 * x0 - 0.3 * o0 + 0.2 * z[0]
    o1 = np.tanh(x1) + 0.4
    x2 = 0.7 * x1 + 0.1 * o0 + 0.4 * o1 + 0.3 * z[0] - 0.6 * z[1]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x2, rtol=0, atol=2e-6)  # float32 arithmetic on numbers of order 3
    assert seen == [(np.float32, 9.0), (np.float32, 4.0)]


def test_noise_is_drawn_only_where_a_row_uses_it():
    drawn = []

    def noise(j):
        drawn.append(j)
        return np.zeros((1, 1, 2, 2), np.float32)

    plan = plan_of(
        PlanStep(timestep=2, a=1.0, b={0: 1.0}),
        PlanStep(timestep=1, a=1.0, b={1: 1.0}, c={1: 1.0}),
        PlanStep(timestep=0, a=1.0, b={2: 1.0}),
    )
    plan.sample(lambda x, t: x, noise)
    assert drawn == [-1, 1]


def test_outputs_that_no_later_row_reads_are_dropped():
    """Memory: of 30 outputs only the one before and the present one are ever alive together."""
    alive: list[weakref.ref] = []
    most = 0

    def network(x, t):
        nonlocal most
        out = np.zeros_like(x)
        alive.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in alive))
        return out

    two_step(30).sample(network, lambda j: np.zeros((1, 1, 2, 2), np.float32))
    assert len(alive) == 30
    assert most == 2


def test_an_output_read_much_later_is_kept_until_then():
    steps = [PlanStep(timestep=4 - i, a=1.0, b={i: 0.0}) for i in range(4)]
    steps[3] = PlanStep(timestep=0, a=0.0, b={0: 1.0})
    plan = plan_of(*steps)
    assert plan.last_use == (3, 1, 2, 3)
    outputs = iter(range(1, 5))
    got = plan.sample(lambda x, t: np.full_like(x, next(outputs)), lambda j: np.zeros((1, 1, 2, 2), np.float32))
    assert (got == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_name_the_step_and_the_timestep(bad):
    plan = two_step(5)
    calls = 0

    def network(x, t):
        nonlocal calls
        calls += 1
        out = np.zeros_like(x)
        if calls == 3:
            out[0, 0, 0, 0] = bad
        return out

    with pytest.raises(AccuQuantError, match=r"step 3 of 5 \(timestep 3\)"):
        plan.sample(network, lambda j: np.zeros((1, 1, 2, 2), np.float32))
    assert calls == 3


def test_on_step_sees_every_latent_and_may_stop():
    seen = []

    def on_step(i, x):
        seen.append(i)
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        two_step(5).sample(lambda x, t: x, lambda j: np.zeros((1, 1, 2, 2), np.float32), on_step)
    assert seen == [0, 1, 2]
