"""What the benchmark says beside step times: the loop's own share, memory, and which operators take how long."""

from xml.etree import ElementTree

import numpy as np
import pytest
from accuquant.runtime.benchmark import measure, sides_of, slower
from accuquant.runtime.chart import Bar, bars
from accuquant.runtime.engines.base import EngineOptions, Kernel
from accuquant.runtime.footprint import footprint
from accuquant.runtime.timing import attribute, step_times


def test_a_kernel_belongs_to_the_operators_it_computes_and_else_to_its_kind():
    times = attribute(
        [
            Kernel("Convolution", "i8", ("act.Quantize", "conv1/WithoutBiases", "conv1"), 30.0),
            Kernel("Subgraph", "i8", ("conv1/scaled", "softmax", "conv2.input0.quantize", "conv2"), 8.0),
            Kernel("Convolution", "f32", ("conv_in",), 5.0),
            Kernel("Reorder", "i8", (), 2.0),
            Kernel("Reorder", "i8", (), 3.0),
            Kernel("Const", "i8", (), None),
        ],
        ["conv1", "conv2", "fused_away"],
    )
    assert times.operators == {"conv1": 34.0, "conv2": 4.0, "fused_away": 0.0}
    assert times.others == {"Convolution": 5.0, "Reorder": 5.0}
    assert times.total == 48.0


def test_every_operator_that_is_computed_takes_time(tiny_bundle):
    for network in ("twin", "denoiser"):
        times = step_times(tiny_bundle, network, "openvino", EngineOptions(batch=4, threads=1), 5)
        computed = {name for name, facts in tiny_bundle.manifest.operators.items() if not facts.in_table}
        assert {name for name, taken in times.operators.items() if taken > 0} == computed
        assert times.others["Reduce"] > 0  # of the norms


def test_operators_that_integers_make_slower_are_named_worst_first():
    def side(**operators):
        return {"profile": {"operators": operators}}

    sides = {"fp32": side(a=10.0, b=10.0, c=5.0, gone=0.0), "W8A8": side(a=12.0, b=3.0, c=9.0, gone=1.0)}
    assert list(slower(sides, "fp32", "W8A8").items()) == [("c", (5.0, 9.0)), ("a", (10.0, 12.0))]


def test_memory_is_that_of_the_child_alone(tiny_bundle):
    held = np.ones(2**27, np.float32)  # half a gigabyte that the parent has and the child has not
    taken = footprint(tiny_bundle, "denoiser", "auto", EngineOptions(batch=2))
    assert held.sum() > 0
    assert 20 * 2**20 < taken < 400 * 2**20


def test_the_loop_itself_costs_next_to_nothing(tiny_bundle):
    """The tiny network's step is a millisecond; what the loop adds to it is a few times less, on any machine."""
    row = measure(tiny_bundle, sides_of(tiny_bundle, "auto")[:1], "auto", EngineOptions(8), 3, 5, lambda *_: None)
    assert 0 < row["sides"]["fp32"]["loop_overhead"] < 0.3


@pytest.mark.parametrize("name", ["W4A8, fp32 rest", "a < b & c"])
def test_the_plot_is_well_formed_and_says_what_was_measured(name):
    drawn = bars({"batch 1": [Bar("fp32", 8.0, 7.9, 8.4), Bar(name, 2.0, 1.9, 2.2)]}, title="t", caption="c", unit="ms")
    root = ElementTree.fromstring(drawn)
    shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"fp32", name, "8.00 ms", "2.00 ms"} <= set(shown)
    lengths = [
        float(e.get("width")) for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") != "#ffffff"
    ]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=1e-3)
