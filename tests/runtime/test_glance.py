"""Glances: what the network takes the latent for, while the chain still runs."""

import numpy as np
import pytest
from accuquant.calibrate.trace import SAMPLERS, trace
from accuquant.runtime import noise

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0,
}  # fmt: skip
ALPHA_BAR = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
SHAPE = (1, 4, 4)
PICTURE = np.random.default_rng(0).uniform(-1, 1, (1, *SHAPE)).astype(np.float32)


def knows_one_picture(x, timestep):
    """The ideal noise prediction of a data set of one picture."""
    noise_to_signal = np.interp(timestep, np.arange(1000), np.log(1 / ALPHA_BAR - 1))
    alpha_bar = 1 / (1 + np.exp(noise_to_signal))
    return ((x - np.sqrt(alpha_bar) * PICTURE) / np.sqrt(1 - alpha_bar)).astype(np.float32)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("flow-euler", "consistency")])
def test_a_network_that_knows_the_picture_shows_it_at_every_step(sampler):
    """Whatever the sampler does with noise. Some schedulers end a step before none is left, hence two levels of 255."""
    plan, seen = trace(sampler, SCHEDULE, 12), []
    plan.sample(
        knows_one_picture,
        lambda j: noise.batch([3], j, SHAPE),
        on_output=lambda i, x, output: seen.append(np.abs(plan.glance(i, x, output) - PICTURE).max()),
    )
    assert len(seen) == len(plan)
    assert max(seen) < 0.025


def test_flows_show_where_they_lead():
    plan, seen = trace("flow-euler", {"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}, 8), []
    begun = noise.batch([3], -1, SHAPE)
    plan.sample(
        lambda x, t: begun - PICTURE,
        lambda j: noise.batch([3], j, SHAPE),
        on_output=lambda i, x, output: seen.append(np.abs(plan.glance(i, x, output) - PICTURE).max()),
    )
    assert max(seen) < 1e-5
