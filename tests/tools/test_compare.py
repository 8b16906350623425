"""The comparison tools: budgets that are equal, and a small comparison from checkpoint to table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def contest():
    sys.path.insert(0, str(TOOLS))
    try:
        import contest

        yield contest
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def sweeps(contest):
    import compare_methods

    return compare_methods


def test_an_iteration_costs_its_network_calls(contest):
    """Plain calls count 1, differentiated ones 3, the last row of a group is called once."""
    from accuquant.calibrate.spec import CalibrationSpec

    def cost(method="learned", **settings):
        return contest.cost(contest.Entry("x", CalibrationSpec(batch=2, iterations=10, **settings), method))

    assert cost(group=1) == 10 * 2 * 3
    assert cost(group=5) == 10 * 2 * (4 + 5 * 3)
    assert cost(group=5, gradient="injected-v") == 10 * 2 * 5 * 4
    assert cost(group=5, warmup=10) == cost(group=5) + cost(group=1)
    assert cost(group=5, start="student", aim="local") == cost(group=5) + 10 * 2 * 5
    assert cost("block-wise", group=5) == 10 * 2 * 3


def test_graphs_that_fit_are_not_paid_for_twice(contest):
    """512 MiB at batch 2 hold 64 graphs of 4 MiB, three of 80, and always one."""
    from accuquant.calibrate.spec import CalibrationSpec

    entry = contest.Entry("x", CalibrationSpec(batch=2, iterations=10, group=5))
    assert contest.cost(entry, 4 << 20) == 10 * 2 * 15
    assert contest.cost(entry, 80 << 20) == 10 * 2 * (4 * 5 - 3)
    assert contest.cost(entry, 4 << 30) == contest.cost(entry) == 10 * 2 * (4 * 5 - 1)


@pytest.mark.parametrize("sweep", ["methods", "m", "gradient", "start", "sharing", "learned", "budget"])
def test_every_entry_that_learns_spends_the_same(contest, sweeps, sweep):
    from accuquant.calibrate.spec import CalibrationSpec

    spec = CalibrationSpec()
    budget = contest.cost(contest.Entry("first", spec))
    costs = {e.name: contest.cost(contest.within(e, budget)) / e.share for e in sweeps.SWEEPS[sweep](spec)}
    free = {name for name, cost in costs.items() if cost == 0}
    assert free == ({"min-max", "percentile", "mse", "smoothquant", "gptq"} if sweep == "methods" else set())
    assert all(abs(cost / budget - 1) < 0.01 for name, cost in costs.items() if name not in free), costs


def test_what_a_corrected_output_costs_is_iterations_less(contest, sweeps):
    from accuquant.calibrate.spec import CalibrationSpec

    spec, rows = CalibrationSpec(iterations=200, correct=32), 50
    budget = contest.cost(contest.Entry("first", spec), rows=rows)
    entries = [contest.within(e, budget, rows=rows) for e in sweeps.corrections(spec) if e.spec.iterations]
    assert [contest.cost(e, rows=rows) for e in entries] == pytest.approx([budget] * 4, rel=0.01)
    iterations = {e.name: e.spec.iterations for e in entries}
    assert iterations["multi-step corrected"] == 200 < iterations["multi-step"]
    assert iterations["per-step corrected"] < iterations["per-step"]


def test_budgets_are_a_quarter_a_half_and_all(contest, sweeps):
    from accuquant.calibrate.spec import CalibrationSpec

    entries = sweeps.budgets(CalibrationSpec())
    costs = [contest.cost(contest.within(e, 12e3)) for e in entries if e.name.startswith("multi-step")]
    assert costs == pytest.approx([3e3, 6e3, 12e3], rel=0.01)
    assert {e.name.rpartition(" at ")[0] for e in entries} == {"block-wise from gptq", "per-step", "multi-step"}


def test_time_to_equal_quality_is_the_first_point_as_close_as_the_rivals_best(sweeps):
    from comparison_tables import time_to_equal

    def row(method, seconds, error):
        return {"method": method, "cpu_seconds": seconds, "mse_median": error}

    rows = [row("block-wise at 1/2", 40, 2e-4), row("block-wise at 1", 80, 3e-4), row("a at 1/2", 50, 1e-4)]
    rows += [row("a at 1", 100, 1.5e-4), row("b at 1", 100, 2.1e-4)]
    told = time_to_equal({"rows": rows})
    assert told == (
        "As close as block-wise comes at best (median 2.00e-04, after 40 s): a after 50 s, b is not within its budget."
    )


def test_rows_of_several_engines_are_told_apart(sweeps):
    from comparison_tables import engines

    rows = [{"method": name, "sampled_on": engine} for name, engine in (("a", "one"), ("b", "other"), ("c", "one"))]
    assert engines(rows[::2]) == "one"
    assert engines(rows) == "one (a, c), other (b)"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOLS / "compare_methods.py"), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip


def test_a_comparison_from_checkpoint_to_table(sweeps, tiny, tmp_path):
    checkpoint = tiny.save_checkpoint(tmp_path, tiny.unet())
    arguments = [checkpoint, "--n", 4, "--bits", "4/8,8/8", "--steps", 4, "--out", tmp_path, "--threads", 1]
    arguments += ["--only", "multi-step,block-wise,mse"]
    for setting in ("iterations=3", "trajectories=4", "held_out=2", "checks=1"):
        arguments += ["--set", setting]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "methods-w4a8.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["mse", "block-wise", "multi-step"]
    assert report["steps"] == 4
    for row in report["rows"]:
        assert row["psnr_mean"] > 5
        assert len(row["accumulated_mse"]) == len(row["single_mse_median"]) == report["steps"]
        assert row["method"] in done.stdout
    wide = json.loads((tmp_path / "methods-w8a8.json").read_text())
    assert wide["scheme"]["weight_bits"] == 8
    assert wide["rows"][0]["psnr_mean"] > report["rows"][0]["psnr_mean"]
    for plot in ("methods-w4a8.drift", "methods-w4a8.single", "methods-w8a8.quality", "methods"):
        assert (tmp_path / f"{plot}.svg").read_text().startswith("<?xml")

    # The first three are known, one of them under another sweep's name, and only the fourth is run.
    arguments[arguments.index("multi-step,block-wise,mse")] = "mse,percentile,block-wise,multi-step"
    arguments[arguments.index("4/8,8/8")] = "4/8"
    again = run(*arguments, "--resume")
    assert again.returncode == 0, again.stderr
    longer = json.loads((tmp_path / "methods-w4a8.json").read_text())
    assert [row["method"] for row in longer["rows"]] == ["percentile", "mse", "block-wise", "multi-step"]
    assert longer["rows"][1:] == report["rows"]
    arguments[arguments.index("mse,percentile,block-wise,multi-step")] = "M = 5"
    swept = run(*arguments, "--resume", "--sweep", "m")
    assert swept.returncode == 0, swept.stderr
    (row,) = json.loads((tmp_path / "m-w4a8.json").read_text())["rows"]
    assert row == report["rows"][2] | {"method": "M = 5"}
    header = {k: v for k, v in longer.items() if k != "rows"}
    assert len(sweeps.kept_rows(tmp_path, header)) == 5
    assert not sweeps.kept_rows(tmp_path, header | {"n": 5})  # of other seeds, so measured anew

    # Results are not written over: neither by a new run nor by one under other circumstances.
    before = (tmp_path / "m-w4a8.json").read_text()
    swept = run(*arguments, "--sweep", "m")
    assert "holds results; take them over with --resume" in swept.stderr
    swept = run(*arguments, "--resume", "--sweep", "m", "--reserve", 0.3)
    assert "was measured under other circumstances (scheme: " in " ".join(swept.stderr.split())
    assert (tmp_path / "m-w4a8.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "weather"], "there is methods"),
        (["--only", "luck"], "there is min-max"),
        (["--set", "luck=1"], "among"),
    ],
)
def test_a_wrong_option_is_one_sentence(tiny, tmp_path, arguments, words):
    checkpoint = tiny.save_checkpoint(tmp_path, tiny.unet())
    done = run(checkpoint, *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
