"""What the sampler calls: condition rows, guidance in one doubled batch, and a sentence for what does not fit."""

from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime.bundle import Conditioning
from accuquant.runtime.denoiser import Denoiser, engine_batch
from accuquant.runtime.engines.base import Engine, EngineOptions, Port
from accuquant.runtime.errors import AccuQuantError

KNOWN = Conditioning(classes=5, null=4)


class Classes(Engine):
    """o = x (y + 1) + t, so that every row tells what it was called with."""

    def __init__(self, rows, conditional=True):
        super().__init__(Path(__file__), EngineOptions(batch=rows))
        self.inputs = (Port("x", np.dtype(np.float32), (rows, 1, 2, 2)), Port("t", np.dtype(np.float32), (rows,)))
        if conditional:
            self.inputs += (Port("y", np.dtype(np.int64), (rows,)),)
        self.out, self.calls = np.zeros((rows, 1, 2, 2), np.float32), 0

    def _infer(self, inputs):
        self.calls += 1
        y = inputs.get("y", np.zeros(len(self.out), np.int64))
        self.out[:] = inputs["x"] * (y + 1)[:, None, None, None] + inputs["t"][:, None, None, None]
        return [self.out]

    def kernels(self):
        return []

    def close(self):
        pass


def latents(n):
    return np.random.default_rng(0).normal(size=(n, 1, 2, 2)).astype(np.float32)


def made(batch, guidance=1.0, known=KNOWN):
    return Denoiser(Classes(engine_batch(batch, guidance), known is not None), batch, known, guidance)


def test_without_guidance_every_row_has_its_class():
    denoiser, x = made(3), latents(3)
    denoiser.under([0, 1, 2], [4, 0, 2])
    np.testing.assert_array_equal(denoiser(x, 7.0), x * np.array([5, 1, 3], np.float32).reshape(3, 1, 1, 1) + 7)


def test_guidance_goes_from_none_through_the_class_in_one_call():
    denoiser, x = made(2, 3.0), latents(2)
    denoiser.under([0, 1], [1, 2])
    free, wanted = x * 5 + 7, x * np.array([2, 3], np.float32).reshape(2, 1, 1, 1) + 7
    np.testing.assert_allclose(denoiser(x, 7.0), free + 3 * (wanted - free), rtol=1e-6)
    assert denoiser.engine.calls == 1


def test_a_seed_has_a_class_of_its_own_unless_one_is_chosen():
    denoiser, x = made(2), np.ones((2, 1, 2, 2), np.float32)
    denoiser.under([7, 2**63 + 4])
    assert denoiser(x, 0.0)[:, 0, 0, 0].tolist() == [7 % 5 + 1, (2**63 + 4) % 5 + 1]


def test_predictions_stay_when_the_engine_writes_again():
    for guidance in (1.0, 2.0):
        denoiser, x = made(2, guidance), latents(2)
        first = denoiser(x, 1.0)
        kept = first.copy()
        denoiser(x + 1, 2.0)
        np.testing.assert_array_equal(first, kept)


def test_a_network_without_condition_is_called_with_nothing():
    denoiser, x = made(2, known=None), latents(2)
    denoiser.under([1, 2])
    np.testing.assert_array_equal(denoiser(x, 3.0), x + 3)
    with pytest.raises(AccuQuantError, match="takes no condition"):
        denoiser.under([1, 2], [0, 0])


@pytest.mark.parametrize(
    ("classes", "words"),
    [([0, 5], "class 5 is out of range; the network knows 0 to 4"), ([-1, 0], "class -1"), ([1], "1 classes for 2")],
)
def test_classes_that_do_not_fit_are_named(classes, words):
    with pytest.raises(AccuQuantError, match=words):
        made(2).under([0, 1], classes)


@pytest.mark.parametrize(
    ("known", "guidance", "words"),
    [
        (None, 2.0, "the network takes no condition"),
        (Conditioning(classes=5), 2.0, "no class that stands for none"),
        (KNOWN, float("nan"), "out of range"),
        (KNOWN, -1.0, "out of range"),
    ],
)
def test_guidance_that_a_network_cannot_have_is_refused(known, guidance, words):
    with pytest.raises(AccuQuantError, match=words):
        made(2, guidance, known)
