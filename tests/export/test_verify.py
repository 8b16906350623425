"""How far the SQNR of a graph may be from that of its simulation."""

import numpy as np
import pytest
from accuquant.export.verify import CHANCE, SQNR_TOLERANCE, tolerance

NOISE = np.random.default_rng(0).uniform(0.5, 1.5, (8, 4))  # of 8 steps, 4 trajectories


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 2.0])
def test_what_all_latents_have_alike_is_not_explained_by_chance(factor):
    """Every latent lost 3 dB, say: a graph that computes something else."""
    assert tolerance(np.ones((8, 4)), np.full((8, 4), factor)) == SQNR_TOLERANCE


def test_of_many_latents_some_that_flip_explain_little():
    made = NOISE.copy()
    made[3] *= 1.5  # one step in eight is off
    assert tolerance(NOISE, made) == pytest.approx(SQNR_TOLERANCE, abs=0.1)


def test_of_few_latents_one_that_flips_explains_more_but_not_anything():
    simulated = np.array([[0.0019], [0.0029]])
    assert SQNR_TOLERANCE < tolerance(simulated, simulated * [[0.8], [1.0]]) < CHANCE
    assert tolerance(simulated, simulated * [[1000.0], [1.0]]) == CHANCE


def test_one_latent_alone_explains_nothing():
    assert tolerance(np.array([[1.0]]), np.array([[2.0]])) == SQNR_TOLERANCE
