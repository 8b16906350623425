"""The report says what its facts say, and needs nothing but itself."""

import base64
import math
import re
from html import escape

import numpy as np
import pytest
from accuquant.export import figures
from accuquant.export.report import DriftPoint, LayerRow, ReportFacts, write_report
from accuquant.export.tuning import GroupDecision, Saving, Tuning
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.fidelity import PSNR_CAP, psnr, ssim
from accuquant.runtime.pictures import grid, near_square, to_uint8
from pydantic import ValidationError

N = 5
NAMES = ["conv_in", "mid.attn<0>.q&k", 'up."odd".conv', "fc</td><script>alert(1)</script>"]


def layer(name, **changed):
    row = {
        "name": name,
        "kind": "conv",
        "role": "body",
        "weight_bits": 4,
        "weight_container": "int4",
        "inputs": "uint8",
        "parameters": 1000,
        "stored_bytes": 500,
        "runs_as": "u8",
    }
    return LayerRow(**row | changed)


def facts_of(fp, quantized, **changed):
    product = {"kind": "matmul", "weight_bits": None, "weight_container": "-", "parameters": 0, "stored_bytes": 0}
    values = {
        "title": "tiny <net> at W4A8",
        "found": "a U-Net & its EMA weights – «tiny»",
        "scheme": "W4A8",
        "target": "cpu",
        "policy": "standard",
        "sampler": "ddim",
        "steps": 3,
        "seeds_first": 10,
        "n": len(fp),
        "psnr": psnr(fp, quantized).tolist(),
        "ssim": ssim(fp, quantized).tolist(),
        "drift": [DriftPoint(step=i, timestep=900 - i, median=0.1, p10=0.05, p90=0.2) for i in (1, 2, 3)],
        "held_out": {0: 1e-2, 10: 1e-3, 20: 2e-3},
        "kept": 10,
        "calibration": {"group": 5, "held_out": 4},
        "layers": [layer(name) for name in NAMES] + [layer("product", **product)],
        "sizes": {"checkpoint": 9000, "fp32 graph": 8 * 2**20, "quantized graph": 2**20},
        "times": {"calibration": 300.0, "fp sampling": 4.0, "int sampling": 3.0},
        "machine": {"cpu": "Example <1>", "cores": "2"},
        "versions": {"accuquant": "0.1.0"},
        "engine": "openvino",
    }
    return ReportFacts(**values | changed)


@pytest.fixture
def pair():
    """Pictures and their slightly noisy twins."""
    random = np.random.default_rng(0)
    fp = random.integers(30, 220, (N, 16, 12, 3), dtype=np.uint8)
    return fp, (fp + random.integers(-9, 10, fp.shape)).astype(np.uint8)


@pytest.fixture
def written(pair, tmp_path):
    """Write a report, its facts changed as asked; returns the page's text."""

    def write(**changed):
        return write_report(tmp_path / "report", facts_of(*pair, **changed), *pair).read_text()

    return write


def test_the_json_round_trips(pair, tmp_path):
    facts = facts_of(*pair, held_out={0: 1e-2, 10: math.inf})
    page = write_report(tmp_path / "report", facts, *pair)
    assert page == tmp_path / "report" / "index.html"
    assert sorted(p.name for p in page.parent.iterdir()) == ["index.html", "report.json"]
    assert ReportFacts.model_validate_json((page.parent / "report.json").read_text()) == facts


def test_the_same_facts_give_the_same_page(written):
    assert written() == written()


def test_the_page_stands_alone(written):
    page = written()
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "<script" not in page
    assert "<link" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert page.count("src=") == len(sources) == 7
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind in {"data:image/png;base64", "data:image/svg+xml;base64"}
        start = base64.b64decode(data, validate=True)[:5]
        assert start == (b"\x89PNG\r" if "png" in kind else b"<?xml")


def test_the_page_says_what_the_facts_say(written):
    page = written()
    for name in NAMES:
        assert f"<code>{escape(name)}</code>" in page
    assert "tiny &lt;net&gt; at W4A8" in page
    assert "tiny <net>" not in page
    assert f"n = {N}, seeds 10&ndash;14" in page
    assert "8.00&times; smaller" in page
    assert "0.75&times; fp32, measured in the same run" in page
    assert "<b>5 quantized operators</b>: 4 with 4-bit weights (int4), 1 product of activations." in page
    assert "Example &lt;1&gt;" in page


def test_the_least_faithful_layer_is_told(written):
    page = written(
        layers=[layer("a", reference_db=131.2, engine_db=70.4), layer("b", reference_db=118.0, engine_db=88.0)]
    )
    assert "the graph computes every one to at least <b>118 dB</b> and the engine" in page
    assert "to at least <b>70 dB</b> of what calibration simulated" in page
    assert "of what calibration simulated" not in written()


def test_what_was_left_in_float_for_speed_is_told_with_what_was_not(written):
    def group(form, median, in_float):
        saves = Saving(median=median, low=median - 0.01, high=median + 0.01, n=40)
        return GroupDecision(form=form, layers=(form, f"{form}.2"), saves=saves, in_float=in_float)

    whole = Saving(median=0.06, low=0.05, high=0.07, n=100)
    tuning = Tuning(
        target="cpu", engine="Engine <2>", machine={}, batch=8, noise=0.004, whole=whole, step_seconds=(0.02, 0.0188),
        groups=(group("linear 8x8", -0.08, False), group("conv <1>", 0.07, True)),
    )  # fmt: skip
    page = written(tuning=tuning)
    assert "Left in float for speed" in page
    assert "2 layers in 1 of 2 groups in float; a step takes 20.00 ms without and 18.80 ms with it" in page
    assert "(Engine &lt;2&gt; at batch 8, noise 0.4%)" in page
    first, second = page.index("conv &lt;1&gt;"), page.index("linear 8x8")
    assert first < second
    assert "+7.0% (+6.0% to +8.0%)" in page
    assert "Left in float for speed" not in written()


def test_a_larger_graph_is_called_larger(written):
    assert "2.00&times; larger" in written(sizes={"fp32 graph": 1000, "quantized graph": 2000})


def test_one_time_alone_gives_no_ratio(written):
    assert "measured in the same run" not in written(times={"int sampling": 3.0})


@pytest.mark.parametrize("held_out", [{}, {10: 1e-3}, {0: math.nan, 10: 1e-3}])
def test_a_single_held_out_point_gives_no_curve(written, held_out):
    page = written(held_out=held_out)
    assert "Held-out error by calibration iteration" not in page
    assert page.count("<img") == 6


def test_a_diverged_chain_still_gets_its_report(written):
    lost = DriftPoint(step=1, timestep=0, median=math.inf, p10=0.1, p90=math.nan)
    assert "<img" in written(drift=[lost])


def test_a_bundle_without_drift_layers_or_sizes_still_gets_its_report(written):
    page = written(drift=[], layers=[], sizes={}, times={}, held_out={}, machine={}, versions={}, calibration={})
    assert page.count("<img") == 5


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (70, 4, 4, 1), (20, 256, 256, 3)])
def test_identical_pictures_of_any_number_and_size(shape, tmp_path):
    pictures = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    page = write_report(tmp_path, facts_of(pictures, pictures), pictures, pictures).read_text()
    shown = {1: 1, 70: 64, 20: 16}[shape[0]]  # whole 8 x 8 sheets; 4 x 4 of pictures too large for that
    assert f"{shown} of n = {shape[0]}" in page
    assert f"capped at 99 dB, which {shape[0]} of {shape[0]} reach" in page
    assert "gain 1&times;" in page


def test_latents_without_a_decoder_are_shown_by_their_first_channel(tmp_path):
    latents = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 4), dtype=np.uint8)
    shown = latents[..., :1]
    pages = [write_report(tmp_path, facts_of(some, some), some, some).read_text() for some in (latents, shown)]
    assert "of which the first channel is shown" in pages[0]
    assert "first channel" not in pages[1]
    sheets = [re.findall(r"data:image/png[^'\"]+", page)[:3] for page in pages]
    assert sheets[0] == sheets[1] != []


def test_facts_that_contradict_themselves_are_refused(pair):
    with pytest.raises(ValidationError, match="n is 4"):
        facts_of(*pair, n=N - 1)
    with pytest.raises(ValidationError, match="colour"):
        facts_of(*pair, colour="red")


def test_pictures_that_do_not_pair_are_refused(pair, tmp_path):
    with pytest.raises(AccuQuantError, match="pairwise"):
        write_report(tmp_path, facts_of(*pair), pair[0], pair[1][:-1])
    assert not list(tmp_path.iterdir())


def test_the_gain_uses_the_range_without_clipping():
    fp = np.zeros((1, 4, 4, 1), np.uint8)
    for high, gain in ((0, 1), (1, 64), (5, 32), (15, 16), (16, 8), (127, 2), (128, 1), (255, 1)):
        apart, used = figures.difference(fp, np.full_like(fp, high))
        assert used == gain
        assert (apart == high * gain).all()


def test_psnr_of_a_known_error():
    a = np.full((2, 4, 4, 1), 100, np.uint8)
    b = np.stack([a[0], a[1] + np.uint8(10)])
    np.testing.assert_allclose(psnr(a, b), [PSNR_CAP, 20 * np.log10(255 / 10)])


def test_fidelity_is_symmetric_falls_with_noise_and_is_taken_picture_by_picture(pair):
    a, b = pair
    worse = np.random.default_rng(2).integers(0, 256, a.shape, dtype=np.uint8)
    for measure in (psnr, ssim):
        found = measure(a, b)
        assert found.shape == (N,)
        np.testing.assert_allclose(found, measure(b, a))
        np.testing.assert_allclose(found[3:4], measure(a[3:4], b[3:4]))
        assert (measure(a, worse) < found).all()
        assert (found < measure(a, a)).all()
    np.testing.assert_allclose(ssim(a, a), 1.0)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = np.full((1, 16, 16, 1), 50, np.uint8), np.full((1, 16, 16, 1), 200, np.uint8)
    c1 = (0.01 * 255) ** 2
    np.testing.assert_allclose(ssim(a, b), (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_ssim_of_pictures_smaller_than_the_window(size):
    a = np.random.default_rng(3).integers(0, 256, (2, size, size, 1), dtype=np.uint8)
    np.testing.assert_allclose(ssim(a, a), 1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_agrees_with_skimage(channels):
    metrics = pytest.importorskip("skimage.metrics")
    random = np.random.default_rng(4)
    smooth = np.cumsum(random.normal(size=(4, 30, 26, channels)), axis=1) * 12 + 128
    a = smooth.clip(0, 255).astype(np.uint8)
    b = (smooth + random.normal(size=smooth.shape) * 15).clip(0, 255).astype(np.uint8)
    theirs = [
        metrics.structural_similarity(
            p, q, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2
        )
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b), theirs, atol=2e-3)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_fidelity_refuses_other_arrays(measure, pair):
    a, b = pair
    for left, right in ((a, b[1:]), (a / 255, b), (a[0], b[0])):
        with pytest.raises(AccuQuantError, match="uint8"):
            measure(left, right)


def test_pixels_of_samples():
    x = np.array([-3.0, -1.0, 0.0, 1.0, 7.0, -0.5], np.float32).reshape(1, 2, 1, 3)
    pixels = to_uint8(x)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 1, 3, 2)
    np.testing.assert_array_equal(pixels[0, 0].T, [[0, 0, 128], [255, 255, 64]])


def test_every_pixel_survives_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = levels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(x), levels)


@pytest.mark.parametrize(
    ("n", "columns", "size"),
    [(1, None, (10, 8)), (4, None, (22, 18)), (5, None, (34, 18)), (3, 1, (10, 28)), (3, 9, (34, 8))],
)
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_sheet_shapes(n, columns, size, channels, mode):
    sheet = grid(np.zeros((n, 4, 5, channels), np.uint8), columns)
    assert sheet.size == size
    assert sheet.mode == mode


def test_a_sheet_holds_its_pictures_in_order():
    pictures = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2, 1)
    sheet = np.asarray(grid(pictures, scale=1, gap=1))
    np.testing.assert_array_equal(sheet[:2, :2], pictures[0, :, :, 0])
    np.testing.assert_array_equal(sheet[:2, 3:], pictures[1, :, :, 0])
    np.testing.assert_array_equal(sheet[3:, :2], pictures[2, :, :, 0])
    assert (sheet[2] == 255).all()
    assert (sheet[3:, 3:] == 255).all()
    np.testing.assert_array_equal(np.asarray(grid(pictures[1:2], scale=1, gap=0)), pictures[1, :, :, 0])


def test_near_square():
    assert [near_square(n) for n in (0, 1, 2, 4, 5, 9, 10, 64, 65)] == [1, 1, 2, 2, 3, 3, 4, 8, 9]


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((1, 4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3)),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 1), np.uint8),
    ],
)
def test_a_sheet_refuses_other_arrays(pictures):
    with pytest.raises(AccuQuantError, match="uint8"):
        grid(pictures)
