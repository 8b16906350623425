"""What the sampler calls: condition rows, and guidance in one doubled batch."""

from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime.denoiser import Denoiser, engine_batch
from accuquant.runtime.engines.base import Engine, EngineOptions, Port


class Classes(Engine):
    """o = x (y + 1) + t, so that every row tells what it was called with."""

    def __init__(self, rows):
        super().__init__(Path(__file__), EngineOptions(batch=rows))
        single = np.dtype(np.float32)
        self.inputs = (
            Port("x", single, (rows, 1, 2, 2)),
            Port("t", single, (rows,)),
            Port("y", np.dtype("i8"), (rows,)),
        )
        self.out, self.calls = np.zeros((rows, 1, 2, 2), np.float32), 0

    def _infer(self, inputs):
        self.calls += 1
        self.out[:] = inputs["x"] * (inputs["y"] + 1)[:, None, None, None] + inputs["t"][:, None, None, None]
        return [self.out]

    def kernels(self):
        return []

    def close(self):
        pass


def made(batch, guidance=1.0):
    return Denoiser(Classes(engine_batch(batch, guidance)), batch, guidance)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, 1, 2, 2)).astype(np.float32)


def test_without_guidance_every_row_has_its_condition(x):
    denoiser = made(2)
    denoiser.under({"y": np.array([4, 0])})
    np.testing.assert_array_equal(denoiser(x, 7.0), x * np.array([5, 1], np.float32).reshape(2, 1, 1, 1) + 7)


def test_guidance_goes_from_none_through_the_condition_in_one_call(x):
    denoiser = made(2, 3.0)
    denoiser.under({"y": np.array([1, 2])}, {"y": np.array(4)})
    free, wanted = x * 5 + 7, x * np.array([2, 3], np.float32).reshape(2, 1, 1, 1) + 7
    np.testing.assert_allclose(denoiser(x, 7.0), free + 3 * (wanted - free), rtol=1e-5)
    assert denoiser.engine.calls == 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_predictions_stay_when_the_engine_writes_again(x, guidance):
    denoiser = made(2, guidance)
    first = denoiser(x, 1.0)
    kept = first.copy()
    denoiser(x + 1, 2.0)
    np.testing.assert_array_equal(first, kept)


def test_every_sample_has_its_own_guidance_and_its_own_none(x):
    denoiser = made(2, 3.0)
    denoiser.under({"y": np.array([1, 2])}, {"y": np.array([4, 0])})
    denoiser.guided_by([1.5, 1.0])
    free, wanted = (x * np.array(y, np.float32).reshape(2, 1, 1, 1) + 7 for y in ([5, 1], [2, 3]))
    expected = free + np.array([1.5, 1.0], np.float32).reshape(2, 1, 1, 1) * (wanted - free)
    np.testing.assert_allclose(denoiser(x, 7.0), expected, rtol=1e-5)
