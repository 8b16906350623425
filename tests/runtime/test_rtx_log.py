"""NVIDIA's build log, in samples of release 1.7 as it wrote them, shortened to a few kernels each."""

from pathlib import Path

import pytest
from accuquant.runtime.engines.rtx_log import parse_log
from accuquant.runtime.errors import AccuQuantError

LOGS = Path(__file__).parent / "rtx_1.7_logs"


def read(name):
    return parse_log((LOGS / f"{name}.txt").read_text())


def test_kernels_are_read_in_their_order_with_the_memory_they_take():
    compiled = read("int8")
    assert [k.kind for k in compiled.kernels] == [
        "shape_call", "kgen", "gemm", "gemm", "correlation", "correlation", "signal", "wait",
    ]  # fmt: skip
    assert compiled.precisions(["temb.dense.0", "conv_in", "node_cos"]) == {"temb.dense.0": "Int8", "conv_in": "Int8"}
    assert (compiled.weights_bytes, compiled.activation_bytes) == (3_307_268, 43_005_952)


@pytest.mark.parametrize(
    ("name", "precisions"),
    [
        # Weights of 4 bits alone: a linear layer takes codes and floats, a convolution finds floats.
        ("half-int4", {"conv_in": "Half", "time": "Float x Int4", "kv": "Half x Int4", "qk": "Half", "joined": "Half"}),
        (
            "bfloat16-int4",
            {
                "conv_in": "BFloat16",
                "time": "Float x Int4",
                "kv": "BFloat16 x Int4",
                "q": "BFloat16",
                "av": "BFloat16",
                "joined": "BFloat16",
            },
        ),
        # Attention in one kernel; and a layer whose result is cut in three, on codes that are widened before.
        ("fp8", {"conv_in": "Half", "qkv": "Half", "qk": "FP8", "av": "FP8", "proj": "FP8"}),
        ("int8-attention", {"qkv": "Half", "qk": "Int8", "av": "Int8", "proj": "Int8"}),
    ],
)
def test_a_product_has_the_type_it_is_multiplied_in(name, precisions):
    compiled = read(name)
    assert compiled.precisions(precisions) == precisions


def test_what_quantizes_a_layers_input_is_no_product_of_the_layer():
    kernels = read("int8-attention").kernels
    assert kernels[0].nodes[0] == "qkv.input0.quantize"
    assert (kernels[0].kind, kernels[0].precision) == ("kgen", "Half")


@pytest.mark.parametrize("text", ["", "Total Weights Memory: 12 bytes\n", "Layers:\nsomething else\n"])
def test_another_format_is_an_error_and_not_an_empty_answer(text):
    with pytest.raises(AccuQuantError, match=r"TensorRT-RTX 1\.7"):
        parse_log(text)
