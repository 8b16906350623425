"""The export benchmark: a small shape the whole way, and cases that are not begun."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 4,
}


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    try:
        import bench_export

        yield bench_export
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def tiny_shape(bench, monkeypatch):
    """SDXL's inputs, at a size for tests."""
    import shapes

    row = {"context": torch.zeros(1, 5, 8), "pooled": torch.zeros(1, 4), "sizes": torch.zeros(1, 6)}
    shape = shapes.Shape(lambda: shapes.TextUNet(**TINY), (4, 8, 8), row)
    monkeypatch.setattr(bench, "SHAPES", {"tiny": shape})
    return shape


def test_a_case_is_exported_stage_by_stage(bench, tiny_shape, tmp_path):
    row = bench.export_case("tiny", (4, 8), "tensorrt", tmp_path, calibrate=True)
    stages = list(row["stages"])
    assert stages.index("iteration, M = 4") == stages.index("freeze") - 1
    assert {"freeze", "trace", "lower", "check target", "save quantized", "check denoiser"} <= row["stages"].keys()
    assert row["peak_bytes"] == max(s["peak_bytes"] for s in row["stages"].values())
    assert row["peak_bytes"] >= row["held_bytes"] >= max(s["held_bytes"] for s in row["stages"].values())
    assert set(row["files"]) == {"denoiser.onnx", "twin.onnx"}
    operators = json.loads((tmp_path / "operators.json").read_text())
    assert len(operators) == sum(row["operators"].values())
    assert not any(name.endswith(("conv_in", "conv_out")) for name in operators)
    assert any("add_embedding" in name for name in operators)
    assert row["quantized_parameters"] > 0.9 * row["parameters"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sd15", 859.52), ("sdxl", 2567.46), ("ldm4-imagenet", 400.92), ("dit-xl2", 675.11), ("pixart-xl2", 610.84)],
)
def test_shapes_are_the_published_ones(bench, name, millions):
    """Counts of the originals: DiT's and PixArt's without the variance they learn, 18 thousand."""
    assert bench.parameters(bench.SHAPES[name]) / 1e6 == pytest.approx(millions, abs=0.005)


def test_weights_are_mapped_from_their_file(bench, tiny_shape, tmp_path):
    network = bench.random_network(tiny_shape, tmp_path)
    stored = torch.from_file(str(tmp_path / "weights.bin"), size=(tmp_path / "weights.bin").stat().st_size // 4)
    assert sum(p.numel() for p in network.parameters()) == stored.numel()
    assert stored.isfinite().all()
    assert all(p.device.type == "cpu" for p in network.parameters())
    held = network.unet.conv_in.weight
    assert held.std() == pytest.approx(held[0].numel() ** -0.5, rel=0.2)


def test_a_case_that_does_not_fit_is_not_begun_and_said(bench, tiny_shape, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "needed", lambda *_: (8 << 30, 9 << 30, 4 << 30))
    monkeypatch.setattr(bench, "in_child", lambda *_: pytest.fail("it was begun"))
    monkeypatch.setattr(bench, "SHAPES", {"sdxl": tiny_shape})
    arguments = {"shape": "sdxl", "bits": "8/8", "target": "tensorrt", "compile_for": "", "seconds": 1.0, "cell": ""}
    arguments["calibrate"] = True
    bench.main(out=tmp_path / "sizes.json", limit_gib=20, threads=0, work=tmp_path / "work", **arguments)
    (row,) = json.loads((tmp_path / "sizes.json").read_text())["rows"]
    assert (row["shape"], row["scheme"]) == ("sdxl", "W8A8")
    assert row["estimated_bytes"] > row["free_bytes"]
    assert "files" not in row


def test_a_graph_that_the_compiler_has_no_room_for_is_exported_only(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "needed", lambda *_: (1 << 30, 8 << 30, 4 << 30))
    monkeypatch.setattr(bench, "in_child", lambda arguments, what, limit: {"peak_bytes": 1, "cell": arguments[-1]})
    row = bench.measured("sd15", "8/8", "tensorrt", "sm89", tmp_path, 1.0, 20, 0)
    assert row["cell"] == "export"
    assert row["compiled"] == {"gpu": "sm89", "estimated_bytes": 8 << 30, "free_bytes": 4 << 30}


def test_rows_of_another_machine_are_not_kept(bench, tmp_path):
    report = {"schema_version": 1, "threads": 1, "machine": {"cpu": "a"}, "versions": {"torch": "2"}}
    (tmp_path / "sizes.json").write_text(json.dumps({**report, "rows": [{"shape": "sd15"}]}))
    assert bench.kept_rows(tmp_path / "sizes.json", report) == [{"shape": "sd15"}]
    assert bench.kept_rows(tmp_path / "sizes.json", {**report, "machine": {"cpu": "b"}}) == []
    assert bench.kept_rows(tmp_path / "none.json", report) == []


def test_an_iteration_holds_no_more_than_was_estimated(bench):
    """And no less than a sixth of it; against what was measured and is published."""
    rows = json.loads((TOOLS / "results" / "full-sizes.json").read_text())["rows"]
    held = {row["shape"]: row["held_bytes"] for row in rows if "held_bytes" in row}
    assert {"dit-xl2", "pixart-xl2", "ldm4-imagenet", "sd15"} <= held.keys()
    for name, measured in held.items():
        estimated, _, _ = bench.needed(name, calibrate=True)
        assert measured < estimated < 6 * measured, name
