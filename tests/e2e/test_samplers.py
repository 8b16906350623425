"""Every sampler, end to end: the engine's loop over a traced table against diffusers' own loop around the torch model.

Both start from one noise, and stochastic samplers are fed one noise; so nothing may differ but float32's last digits.
"""

import importlib
import inspect
from functools import lru_cache

import numpy as np
import pytest
import torch
from accuquant.calibrate.trace import SAMPLERS, _noise_source, trace
from accuquant.export.graph import save_graph
from accuquant.runtime import noise
from accuquant.runtime.bundle import Bundle, Manifest, describe, describe_rest, save_manifest
from accuquant.runtime.engines import ENGINES
from accuquant.runtime.pipeline import Pipeline

STEPS, SEEDS = 8, (3, 4, 11)
LARGEST_ERROR = 1e-4  # of the final latent's root mean square
PRECONDITIONED = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}


def schedule_of(tiny, name):
    return PRECONDITIONED if name == "consistency" else tiny.NOISE_SCHEDULE


@pytest.fixture(scope="module")
def any_plan(tiny, tmp_path_factory):
    """The tiny U-Net in float as a bundle that knows all timesteps."""
    folder = tmp_path_factory.mktemp("any")
    save_graph(tiny.float_graph(), folder / "twin.onnx")
    trace("ddim", tiny.NOISE_SCHEDULE, STEPS).save(folder / "plan.json")
    networks = describe(folder, {"twin": "twin.onnx"})
    manifest = Manifest(
        family="ddim", found="", sample_shape=tiny.SHAPE, scheme="FP32", target="cpu", policy="", sampler="any",
        networks=networks, files=describe_rest(folder, networks), operators={}, provenance={}, quality={},
    )  # fmt: skip
    save_manifest(folder, manifest)
    return Bundle(folder)


@pytest.fixture(scope="module")
def of_diffusers(tiny):
    """Final latents of a sampler by diffusers' scheduler and torch, as a pipeline of diffusers' computes them."""
    network = tiny.unet()

    @lru_cache
    @torch.no_grad()
    def run(name):
        chosen = SAMPLERS[name]
        factory = getattr(importlib.import_module("diffusers"), chosen.scheduler)
        accepted = inspect.signature(factory.__init__).parameters
        settings = {**schedule_of(tiny, name), **chosen.config, "clip_sample": False, "clip_denoised": False}
        scheduler = factory(**{k: v for k, v in settings.items() if k in accepted})
        if chosen.timesteps is None:
            scheduler.set_timesteps(STEPS)
        else:
            scheduler.set_timesteps(timesteps=chosen.timesteps(STEPS, scheduler.config.num_train_timesteps))
        drawn = {i: torch.from_numpy(noise.batch(SEEDS, i, tiny.SHAPE)) for i in range(-1, len(scheduler.timesteps))}
        x = drawn[-1] * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = network(scaled.float(), t.float().expand(len(SEEDS)))
            with _noise_source(scheduler, lambda i=i: drawn[i].clone()):
                x = scheduler.step(output, t, x, return_dict=False, **chosen.step)[0]
        return x.float().numpy()

    return run


def test_there_are_twenty():
    assert len(SAMPLERS) == 20


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_ends_where_diffusers_does(name, engine, any_plan, of_diffusers, tiny):
    plan = trace(name, schedule_of(tiny, name), STEPS)
    with Pipeline(any_plan, network="twin", engine=engine, batch=2, plan=plan) as pipeline:
        ours = pipeline.generate(SEEDS)
    theirs = of_diffusers(name)
    assert np.isfinite(theirs).all()
    error = np.abs(ours - theirs).max() / np.sqrt(np.square(theirs).mean())
    assert error <= LARGEST_ERROR, f"{name} on {engine}: {error:.1e}"
