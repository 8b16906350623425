"""What an export says at its end: what every layer is stored and computed in, sizes, memory and time, each apart."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accuquant.calibrate.begin import Beginning
from accuquant.calibrate.correction import OutputCorrection
from accuquant.calibrate.optimize import Outcome
from accuquant.export.measure import Comparison
from accuquant.export.summary import layers, summary
from accuquant.runtime.bundle import IN_TABLE, OperatorFacts
from rich.console import Console

NO_VNNI = "this CPU has no VNNI"


def facts(kind="conv", bits=4, container="int4"):
    return OperatorFacts(
        kind=kind, role="body", weight_bits=bits, weight_container=container, inputs=("uint8",), parameters=8,
        stored_bytes=4,
    )  # fmt: skip


def manifest(operators, in_float=None):
    return SimpleNamespace(operators=operators, in_float=in_float or {})


FIVE = {
    **{f"conv.{n}": facts() for n in range(3)},
    "kept": facts(bits=8, container="int8"),
    "time": facts("linear", container=IN_TABLE),
}


def test_layers_that_are_alike_are_one_line():
    told = list(layers(manifest(FIVE), dict.fromkeys(FIVE, "u8"), {}))
    assert told == [
        "3 convolutions: 4-bit weights, stored as int4, computed as u8",
        "1 convolution: 8-bit weights, stored as int8, computed as u8",
        "1 linear layer: 4-bit weights, looked up by timestep",
    ]


def test_layers_that_do_not_get_what_they_asked_for_are_named_with_the_reason():
    ran = dict.fromkeys(FIVE, "u8") | {"conv.1": "f32"}
    told = list(layers(manifest(FIVE), ran, {"conv.1": NO_VNNI}))
    assert "1 convolution: 4-bit weights, stored as int4, computed as f32" in told
    assert f"of these conv.1 computed as f32: {NO_VNNI}" in told


def test_what_is_left_in_float_is_named_by_its_reason_and_many_names_are_counted():
    many = {f"up.{n}": "asked for (--in-float up.*)" for n in range(6)} | {"conv_in": "policy standard"}
    told = list(layers(manifest({}, many), {}, {}))
    assert told == [
        "left in float: up.0, up.1, up.2, up.3 and 2 more (all in the report) (asked for (--in-float up.*))",
        "left in float: conv_in (policy standard)",
    ]


def test_an_engine_that_does_not_say_is_not_spoken_for():
    assert next(iter(layers(manifest(FIVE), {}, {}))).endswith(
        "stored as int4, the engine does not say computed as what"
    )
    assert next(iter(layers(manifest(FIVE), None, {}))).endswith("stored as int4")


@pytest.fixture
def printed(tiny_bundle):
    """The summary as text; of a bundle that was made for `target`, as far as it goes."""

    def told(target):
        bundle = SimpleNamespace(
            manifest=tiny_bundle.manifest.model_copy(update={"target": target}),
            folder=tiny_bundle.folder,
            weight_bytes=tiny_bundle.weight_bytes,
        )
        pictures, few = np.zeros((2, 8, 8, 1), np.uint8), np.array([30.0, 40.0])
        ran = {name: "u8" for name, known in bundle.manifest.operators.items() if not known.in_table}
        comparison = Comparison(
            pictures, pictures, few, few / 50, np.zeros((6, 2)), {"twin": 2.0, "denoiser": 1.0}, "OpenVINO CPU", ran, {}
        )
        correction = OutputCorrection(torch.tensor([1.0]), torch.zeros(1, 3))
        outcome = Outcome(Beginning("mse, gptq", {}), {0: 2e-3, 4: 1e-3}, 4, [], correction, uncorrected=3e-3)
        request = SimpleNamespace(checkpoint=tiny_bundle.folder, tuning=None, spec=SimpleNamespace(held_out=4, group=5))
        console = Console(width=200)
        with console.capture() as shown:
            console.print(summary(request, SimpleNamespace(bundle=bundle, comparison=comparison, outcome=outcome)))
        return shown.get()

    return told


def test_size_memory_and_time_are_rows_of_their_own(printed, tiny_bundle):
    lines = [line.strip("│|").replace("|", "│") for line in printed("cpu").splitlines()]
    rows = {head.strip(): told for head, bar, told in (line.partition("│") for line in lines) if bar}
    whole = sum(path.stat().st_size for path in tiny_bundle.folder.rglob("*") if path.is_file())
    assert f"{whole / 2**20:.2f} MiB" in rows["bundle on disk"]
    assert f"{tiny_bundle.weight_bytes('denoiser') / 2**20:.2f} MiB" in rows["graph on disk"]
    assert "in memory" in rows["quantized weights"]
    assert "one after the other on OpenVINO CPU; side by side: accuquant-bench" in rows["time of 2 pictures"]
    assert "MiB" not in rows["time of 2 pictures"]
    assert " computed as u8" in rows["layers"]
    assert rows["end-of-chain error"].strip() == (
        "3.00e-03 at the start, 2.00e-03 with the output corrected by timestep, 1.00e-03 kept "
        "(iteration 4; n = 4 held out)"
    )


def test_what_stood_in_for_a_gpu_is_neither_timed_nor_said_to_compute(printed):
    text = printed("tensorrt")
    assert "not measured: this is for tensorrt, and OpenVINO CPU stood in for it" in text
    assert "accuquant-inspect BUNDLE --gpu sm89" in text
    assert "computed as" not in text
