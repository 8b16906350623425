"""Noise is a function of (seed, index) and of nothing else."""

import numpy as np
import pytest
from accuquant.runtime import noise

SHAPE = (3, 5)


def test_a_sample_does_not_depend_on_its_neighbours():
    alone = noise.normal(7, 3, SHAPE)
    for seeds in ([7], [7, 8, 9], [100, 7], [9, 8, 7, 6, 5, 4]):
        np.testing.assert_array_equal(noise.batch(seeds, 3, SHAPE)[seeds.index(7)], alone)


def test_drawing_other_noise_in_between_changes_nothing():
    first = noise.normal(7, 3, SHAPE)
    np.random.seed(0)
    noise.normal(7, 4, SHAPE)
    np.testing.assert_array_equal(noise.normal(7, 3, SHAPE), first)


# Written down from this implementation on x86-64 with numpy 2.4: the raw Philox stream is exact for ever, logarithm and
# cosine may differ by an ulp between C libraries, hence a tolerance of a few float32 ulps and not equality.
GOLDEN = {
    (0, -1): [-0.00366030796431005, 0.2516663074493408, 0.1896292120218277, -1.8150962591171265],
    (1, 0): [0.6246734261512756, -0.11285406351089478, -0.8537609577178955, 1.4668846130371094],
    (7, 3): [0.34086623787879944, -0.9478462338447571, -0.5611353516578674, 0.20040403306484222],
}


@pytest.mark.parametrize(("seed", "index"), GOLDEN)
def test_golden_values(seed, index):
    drawn = noise.normal(seed, index, SHAPE)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.ravel()[[0, 1, 7, 14]], GOLDEN[seed, index], rtol=1e-6, atol=1e-7)


def test_a_smaller_picture_is_not_a_corner_of_a_larger_one_but_shapes_of_one_size_agree():
    """Only the number of values enters, not their arrangement."""
    np.testing.assert_array_equal(noise.normal(5, 0, (2, 6)).ravel(), noise.normal(5, 0, (3, 4)).ravel())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_odd_sizes(count):
    assert noise.normal(3, 0, (count,)).shape == (count,)
    assert np.isfinite(noise.normal(3, 0, (count,))).all()


def test_moments_are_those_of_a_standard_normal():
    """2^18 values: the mean has standard error 0.002, the standard deviation 0.0014, kurtosis 0.0096; 5 of each."""
    z = noise.batch(range(64), 2, (4096,)).astype(np.float64).ravel()
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.007
    assert abs((z**4).mean() - 3) < 0.048
    assert abs((z > 1.959964).mean() - 0.025) < 5 * np.sqrt(0.025 * 0.975 / z.size)


def test_seeds_and_steps_are_uncorrelated():
    """All pairs of 6 seeds x 6 steps over 4096 values: correlations have standard error 1/64."""
    many = np.stack([noise.normal(s, i, (4096,)) for s in range(6) for i in range(-1, 5)]).astype(np.float64)
    off = np.corrcoef(many) - np.eye(len(many))
    assert np.abs(off).max() < 5 / 64


def test_distinct_indices_and_seeds_differ():
    drawn = {noise.normal(s, i, (4,)).tobytes() for s in range(20) for i in range(-1, 50)}
    assert len(drawn) == 20 * 51


@pytest.mark.filterwarnings("error")
def test_seeds_up_to_2_to_the_64_are_distinct():
    """The documented range is 0 <= seed < 2^64; large seeds must not collapse onto one another."""
    seeds = [0, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
    assert len({noise.normal(s, 0, (4,)).tobytes() for s in seeds}) == len(seeds)


def test_numpy_integers_are_as_good_as_pythons():
    np.testing.assert_array_equal(noise.normal(np.int64(9), 0, SHAPE), noise.normal(9, 0, SHAPE))
