"""The three commands as a person runs them: what they print, what they leave, how they fail."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from accuquant.runtime.engines import rests

MODULES = {
    "accuquant-export": "accuquant.export.cli",
    "accuquant-sample": "accuquant.runtime.cli_sample",
    "accuquant-bench": "accuquant.runtime.cli_bench",
}


def run(name, *arguments, cwd, **environment):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.argv[0] = {name!r}; from {MODULES[name]} import main; main()",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "160", "ACCUQUANT_CACHE": str(cwd / "cache")} | environment,
    )


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    checkpoint = tiny.save_checkpoint(folder, tiny.unet())
    arguments = [checkpoint, "--bits", "4/8", "--preset", "smoke", "--steps", "5", "--pictures", "4"]
    return folder, run("accuquant-export", *arguments, cwd=folder)


def test_export_says_what_it_found_and_what_it_made(exported):
    folder, done = exported
    assert done.returncode == 0, done.stderr
    for words in (
        "ermongroup/ddim U-Net",
        "1x8x8, configuration from tiny.yml",
        "DDIMScheduler, 5 network calls",
        "W4A8 for cpu, policy standard",
        "PSNR to the fp twin",
        "n = 4",
        "4-bit weights, stored as int4",
        "4-bit weights, looked up by timestep",
        "MiB stored, ",
    ):
        assert words in done.stdout, words
    assert "Warning" not in done.stderr
    assert (folder / "tiny-w4a8" / "manifest.json").exists()
    assert (folder / "tiny-w4a8" / "report" / "index.html").exists()


def test_another_export_of_the_checkpoint_follows_the_same_teacher_without_running_it(exported):
    folder, _ = exported
    kept = sorted((folder / "cache").iterdir())
    assert len(kept) == 2
    done = run(
        "accuquant-export", "tiny.ckpt", "--bits", "8/8", "--preset", "smoke", "--steps", 5, "--pictures", 4, cwd=folder
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trajectories" not in done.stdout.replace("of 8 trajectories each", "")
    assert sorted((folder / "cache").iterdir()) == kept


def test_calibration_settings_are_reached_by_name(exported):
    """And a cache of no size keeps nothing of the trajectories that other steps need."""
    folder, _ = exported
    kept = sorted((folder / "cache").iterdir())
    done = run(
        "accuquant-export", "tiny.ckpt", "--bits", "4/8", "--preset", "smoke", "--steps", 4, "--pictures", 4,
        "--out", "other", "--split", "--set", "gradient=injected-v", "--set", "bias_rate=1e-3", "--cache-gib", 0,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "teacher trajectories ..." in done.stdout
    assert sorted((folder / "cache").iterdir()) == kept
    assert "injected-v gradient" in done.stdout
    manifest = json.loads((folder / "other" / "manifest.json").read_text())
    assert manifest["provenance"]["calibration"]["bias_rate"] == 1e-3
    assert any(len(f["inputs"]) == 2 and f["kind"] == "conv" for f in manifest["operators"].values())


def test_sample_writes_grid_latents_and_folder(exported):
    folder, _ = exported
    for out in ("grid.png", "latents.npy", "many"):
        done = run("accuquant-sample", "tiny-w4a8", "-n", 3, "--seed", 5, "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "3 pictures, seeds 5..7" in done.stdout
    assert sorted(p.name for p in (folder / "many").iterdir()) == ["00000005.png", "00000006.png", "00000007.png"]


def test_bench_measures_both_sides_and_writes_json(exported):
    folder, _ = exported
    done = run("accuquant-bench", "tiny-w4a8", "--batch", "1,2", "--repeats", 5, "--samples", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "bench.json").read_text())
    assert [row["batch"] for row in report["results"]] == [1, 2]
    for row in report["results"]:
        sides = row["sides"]
        assert len(sides) == 2 * len(rests()), "integers are held against every float type that the machine has"
        assert next(iter(sides)) == "fp32"
        for name, side in sides.items():
            assert side["step_seconds"]["n"] == 5
            assert 0 < side["step_seconds"]["p10"] <= side["step_seconds"]["median"]
            ratio = sides["fp32"]["step_seconds"]["median"] / side["step_seconds"]["median"]
            assert side["step_speedup"] == pytest.approx(ratio)
            assert name in done.stdout
            assert side["peak_bytes"] > 0
            assert side["profile"]["operators"]
    assert "operators take longer than in fp32" in done.stdout
    assert (folder / "bench.svg").read_text().startswith("<svg")
    assert report["machine"]["cpu"]


def mistakes(folder):
    (folder / "words.ckpt").write_text("not a checkpoint")
    (folder / "cut.ckpt").write_bytes((folder / "tiny.ckpt").read_bytes()[:20_000])
    return [
        (["accuquant-export", "absent.ckpt"], "absent.ckpt does not exist"),
        (["accuquant-export", "words.ckpt"], "words.ckpt is"),
        (["accuquant-export", "cut.ckpt"], "cut.ckpt is cut off"),
        (["accuquant-export", "tiny.ckpt", "--bits", "3.5"], "--bits '3.5' is not understood"),
        (["accuquant-export", "tiny.ckpt", "--bits", "16/8"], "16-bit weights"),
        (["accuquant-export", "tiny.ckpt", "--target", "tpu"], "target tpu"),
        (["accuquant-export", "tiny.ckpt", "--set", "groups=3"], "a name among"),
        (["accuquant-export", "tiny.ckpt", "--in-float", "mid.block_3.conv1"], "(near it are mid.block_2.conv1"),
        (["accuquant-export", "tiny.ckpt", "--set", "gradient=guess"], "gradient guess"),
        (["accuquant-export", "tiny.ckpt", "--preset", "fast"], "known: smoke, default, best"),
        (["accuquant-export", "tiny.ckpt", "--sampler", "dimm"], "unknown sampler 'dimm'"),
        (["accuquant-export", "tiny.ckpt", "--steps", "5000"], "5000 sampling steps"),
        (["accuquant-export", "tiny.ckpt", "--tune", "--tuned", "tiny-w4a8"], "leave one of them out"),
        (["accuquant-export", "tiny.ckpt", "--tuned", "tiny-w4a8"], "exported without --tune"),
        (
            ["accuquant-export", "tiny.ckpt", "--tune", "--bits", "fp16", "--target", "tensorrt"],
            "leaves everything in float already",
        ),
        (["accuquant-sample", "."], "is not a bundle"),
        (["accuquant-sample", "tiny-w4a8", "--out", "grid.jpg"], "write .png"),
        (["accuquant-sample", "tiny-w4a8", "--engine", "fast"], "unknown engine 'fast'"),
        (["accuquant-bench", "tiny-w4a8", "--batch", "one"], "positive whole numbers"),
        (["accuquant-bench", "tiny-w4a8", "--compare", "theirs"], "write NAME=GRAPH"),
    ]


def test_mistakes_are_one_sentence(exported, monkeypatch, capsys):
    """One clear sentence, exit code 1, no traceback, and no new file."""
    folder, _ = exported
    cases = mistakes(folder)
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.chdir(folder)
    for (name, *arguments), sentence in cases:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(MODULES[name]).main()
        stderr = capsys.readouterr().err
        assert stopped.value.code == 1, (arguments, stderr)
        assert sentence in stderr, (sentence, stderr)
        assert stderr.startswith("error:")
        assert "Traceback" not in stderr
    assert sorted(p.name for p in folder.iterdir()) == before


def test_debug_shows_the_traceback(exported):
    folder, _ = exported
    done = run("accuquant-export", "absent.ckpt", "--debug", cwd=folder)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
