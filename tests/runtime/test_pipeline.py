"""The pipeline: a sample depends on its seed alone, and a damaged bundle never samples."""

import json
import shutil

import numpy as np
import pytest
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pipeline import Pipeline


def test_a_sample_does_not_change_with_its_neighbours(tiny_bundle):
    with Pipeline(tiny_bundle, batch=4) as pipeline:
        together = pipeline.generate([3, 1, 4, 1, 5, 9])
        alone = pipeline.generate([5])
        np.testing.assert_array_equal(together[1], together[3])
        np.testing.assert_array_equal(together[4], alone[0])


def test_batch_size_changes_nothing_a_person_could_see(tiny_bundle):
    """Kernels are chosen by shape, so sums may round differently; the integers in between absorb most of it."""
    results = {}
    for batch in (1, 4):
        with Pipeline(tiny_bundle, network="twin", batch=batch) as pipeline:
            results[batch] = pipeline.generate(range(4))
    np.testing.assert_allclose(results[1], results[4], atol=1e-4)


@pytest.fixture(scope="module")
def timeless_bundle(tiny, tmp_path_factory):
    """The tiny U-Net's graphs for any timestep."""
    return tiny.export(tmp_path_factory.mktemp("timeless"), weight_bits=8, time_table=False)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m", "plms", "heun", "euler-a", "unipc"])
def test_twin_on_the_engine_equals_torch_for_every_kind_of_sampler(tiny, timeless_bundle, sampler):
    plan = trace(sampler, tiny.NOISE_SCHEDULE, 5)
    reference = simulate(tiny.unet(), plan, range(3), tiny.SHAPE).states[-1].numpy()
    with Pipeline(timeless_bundle, network="twin", batch=3, plan=plan) as pipeline:
        out = pipeline.generate(range(3))
    # float32 networks in two libraries, a handful of steps; relative to the latent's own size
    assert np.abs(out - reference).max() < 2e-3 * np.abs(reference).max()


def test_a_plan_whose_timesteps_the_graphs_do_not_hold_is_refused(tiny, tiny_bundle):
    """Nearest rows of a table would sample something, and nobody would be told."""
    assert tiny_bundle.manifest.timesteps == "plan"
    with pytest.raises(AccuQuantError, match=r"knows the 6 timesteps.* not 20; .*--no-time-table"):
        Pipeline(tiny_bundle, plan=trace("ddim", tiny.NOISE_SCHEDULE, 5))


def test_another_sampler_on_the_same_timesteps_is_welcome(tiny, tiny_bundle):
    plan = trace("ddpm", tiny.NOISE_SCHEDULE, 6)
    assert plan.timesteps == tiny_bundle.plan.timesteps
    reference = simulate(tiny.unet(), plan, range(2), tiny.SHAPE).states[-1].numpy()
    with Pipeline(tiny_bundle, network="twin", batch=2, plan=plan) as pipeline:
        assert np.abs(pipeline.generate(range(2)) - reference).max() < 2e-3 * np.abs(reference).max()


def test_steps_are_reported_and_a_callback_can_stop(tiny_bundle):
    seen = []

    def stop(first, done, x):
        seen.append((first, done, x.shape))
        if done == 2:
            raise KeyboardInterrupt

    with Pipeline(tiny_bundle, batch=2) as pipeline:
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(range(4), stop)
        assert seen == [(0, 1, (2, 1, 8, 8)), (0, 2, (2, 1, 8, 8))]
        assert np.isfinite(pipeline.generate([0])).all()  # still usable


def test_seeds_out_of_range_are_refused(tiny_bundle):
    with Pipeline(tiny_bundle, batch=1) as pipeline, pytest.raises(AccuQuantError, match="seed -1 is out of range"):
        pipeline.generate([-1])


class TestBundle:
    @pytest.fixture
    def copied(self, tiny_bundle, tmp_path):
        return shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")

    def test_not_a_bundle(self, tmp_path):
        with pytest.raises(AccuQuantError, match="accuquant-export"):
            Bundle(tmp_path)

    def test_missing_graph(self, copied):
        (copied / "denoiser.onnx").unlink()
        with pytest.raises(AccuQuantError, match=r"denoiser\.onnx is missing"):
            Bundle(copied)

    def test_flipped_bit(self, copied):
        data = bytearray((copied / "denoiser.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (copied / "denoiser.onnx").write_bytes(data)
        with pytest.raises(AccuQuantError, match="digest differs"):
            Bundle(copied)

    def test_unknown_manifest_key(self, copied):
        manifest = json.loads((copied / "manifest.json").read_text())
        (copied / "manifest.json").write_text(json.dumps(manifest | {"surprise": 1}))
        with pytest.raises(AccuQuantError, match="surprise"):
            Bundle(copied)

    @pytest.mark.parametrize(
        "name", ["../twin.onnx", "/etc/passwd", "report/../../x", "..", ".", "", "a\\b", "C:x", "a\0b"]
    )
    @pytest.mark.parametrize("among", ["networks", "files"])
    def test_path_outside_the_bundle(self, copied, name, among):
        manifest = json.loads((copied / "manifest.json").read_text())
        if among == "networks":
            manifest["networks"]["twin"]["files"] = {name: manifest["networks"]["twin"]["files"]["twin.onnx"]}
        else:
            manifest["files"][name] = manifest["files"]["plan.json"]
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(AccuQuantError, match="not a file of the bundle"):
            Bundle(copied)

    def test_every_file_is_described(self, tiny_bundle):
        present = {p.relative_to(tiny_bundle.folder).as_posix() for p in tiny_bundle.folder.rglob("*") if p.is_file()}
        assert set(tiny_bundle.digests) == present - {"manifest.json"}
        assert "report/index.html" in present

    @pytest.mark.parametrize("name", ["plan.json", "recipe.json", "recipe.safetensors", "report/report.json"])
    def test_a_changed_file_of_any_kind_is_found(self, copied, name):
        with (copied / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(AccuQuantError, match="digest differs"):
            Bundle(copied)

    def test_truncated_plan(self, copied):
        text = (copied / "plan.json").read_text()
        (copied / "plan.json").write_text(text[: len(text) // 2])
        with pytest.raises(AccuQuantError, match=r"plan\.json"):
            Bundle(copied)

    def test_bundles_of_another_schema_are_refused(self, copied):
        manifest = json.loads((copied / "manifest.json").read_text())
        (copied / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))
        with pytest.raises(AccuQuantError, match="schema_version"):
            Bundle(copied)
