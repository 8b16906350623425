"""The page of results: what is drawn of full-size runs, those that did not fit included."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def publish(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import publish

    yield publish
    for name in ("publish", "tables", "cpu_ratios", "cards"):
        sys.modules.pop(name)


def test_full_sizes_say_what_fitted_and_what_did_not(publish):
    gib = 2**30
    stage = {"seconds": 9.0, "held_bytes": gib}
    asked = {"scheme": "W4A8", "target": "tensorrt", "calibrated": True, "estimated_bytes": 6 * gib}
    done = {
        "parameters": 675e6, "operators": {"linear": 100, "matmul": 56},
        "stages": {
            "ranges": {**stage, "cpu_seconds": 2.0, "peak_bytes": 3 * gib},
            "iteration, M = 4": {**stage, "cpu_seconds": 40.0, "peak_bytes": 5 * gib},
            "save twin": {**stage, "cpu_seconds": 3.0, "peak_bytes": 4 * gib},
        },
        "files": {"twin.onnx": gib // 2, "twin.onnx.data": 2 * gib, "denoiser.onnx": gib // 2},
    }  # fmt: skip
    machine = {"cpu": "a", "cores": "2", "instructions": "avx2", "memory": "24 GiB"}
    drawn = publish.full_size_table(
        {
            "limit_bytes": 16 * gib, "threads": 1, "note": "beside other work", "machine": machine,
            "rows": [
                {"shape": "sdxl", **asked, "free_bytes": 5 * gib},
                {"shape": "dit-xl2", **asked, **done},
                {"shape": "sd15", **asked, "beyond_bytes": 16 * gib},
            ],
        }
    )  # fmt: skip
    lines = drawn.splitlines()
    assert "not begun: more than 5.0 GiB" in lines[2]
    assert lines[3].endswith("| 675 M | 156 | 6.0 GiB | 5.00 GiB | 40 s | 4.00 GiB | 5 s | 2.50 GiB | 0.50 GiB |")
    assert "given up beyond 16.0 GiB" in lines[4]
    assert {line.count("|") for line in lines[:5]} == {12}
    assert "beside other work" in lines[-1]
