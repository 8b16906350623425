"""Bits as a person writes them, and the grid each operator gets."""

import pytest
import torch
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.scheme import QuantScheme, parse_bits, parse_precision
from accuquant.runtime.errors import AccuQuantError
from pydantic import ValidationError

BODY = ["body", "attention"]
ENDS = ["first", "last", "time"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("4/8", (4, 8)),
        ("8/8", (8, 8)),
        ("2/2", (2, 2)),
        ("W4A8", (4, 8)),
        ("w6a6", (6, 6)),
        ("8", (8, 8)),
        ("4", (4, 8)),
        ("w4", (4, 8)),
        (" 4/8 ", (4, 8)),
        ("w4a16", (4, 16)),
    ],
)
def test_bits_that_are_understood(text, bits):
    assert parse_bits(text) == bits


@pytest.mark.parametrize(
    "text",
    ["", " ", "/", "4/", "/8", "a8", "4/8/8", "-4/8", "4.0/8", "four", "W4/A8", "int8", "fp16", "4x8", "4 8", "²/8"],
)
def test_bits_that_are_not_understood_say_how_to_write_them(text):
    with pytest.raises(AccuQuantError, match="4/8"):
        parse_bits(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1/8", "1-bit weight"),
        ("9/8", "9-bit weight"),
        ("4/12", "12-bit activation"),
        ("4/0", "0-bit activation"),
        ("32", "32-bit weight"),
    ],
)
def test_bits_out_of_range_say_which(text, said):
    with pytest.raises(AccuQuantError, match=said):
        parse_bits(text)


@pytest.mark.parametrize("text", ["fp8", "FP8", " float8 "])
def test_8_bit_floats_are_understood(text):
    scheme = QuantScheme(target="tensorrt", **parse_precision(text))
    assert scheme.name == "FP8"
    assert scheme.weight_grid("body").dtype == torch.float8_e4m3fn
    assert scheme.activation_grid("attention", "matmul") == scheme.weight_grid("body")


@pytest.mark.parametrize(
    ("text", "name", "rest"),
    [("fp16", "FP16", "float16"), (" Float16", "FP16", "float16"), ("bf16", "BF16", "bfloat16")],
)
def test_16_bits_throughout_quantize_nothing(tiny_unet, text, name, rest):
    scheme = QuantScheme(target="tensorrt", **parse_precision(text))
    assert (scheme.name, scheme.rest, scheme.described) == (name, rest, f"{rest} throughout")
    assert not quantize_operators(tiny_unet, scheme, role_of)


def test_weights_alone_leave_activations_and_their_products_in_float(tiny_unet):
    scheme = QuantScheme(target="tensorrt", **parse_precision("4/16"))
    assert scheme.name == "W4A16"
    operators = quantize_operators(tiny_unet, scheme, role_of)
    assert {operator.kind for operator in operators.values()} == {"conv", "linear"}
    assert not any(operator.quantizers for operator in operators.values())
    assert [scheme.weight_block(columns) for columns in (320, 96, 48, 64, 16, 20)] == [64, 32, 16, 32, None, None]


@pytest.mark.parametrize(
    ("asked", "quantized"),
    [
        ({}, True),
        ({"attention": "float"}, False),
        ({"target": "tensorrt"}, False),  # has a fused kernel for floats
        ({"target": "tensorrt", "attention": "quantized"}, True),
        ({"target": "tensorrt", "number": "float8"}, True),  # and one for these
    ],
)
def test_products_of_attention_are_quantized_where_that_wins(tiny_unet, asked, quantized):
    scheme = QuantScheme(weight_bits=8, activation_bits=8, **asked)
    kinds = {operator.kind for operator in quantize_operators(tiny_unet, scheme, role_of).values()}
    assert ("matmul" in kinds) == quantized
    assert ("attention products in float" in scheme.described) != quantized


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"number": "float8", "weight_bits": 8, "activation_bits": 8}, "FP8 is for --target tensorrt; cpu is OpenVINO"),
        ({"weight_bits": 4, "activation_bits": 16}, "W4A16 is for --target tensorrt; cpu is OpenVINO"),
        ({"weight_bits": 4, "activation_bits": 12}, "12-bit activations; 2 to 8 bits, or 16"),
        ({"weight_bits": 12, "activation_bits": 8}, "12-bit weights; 2 to 8 bits, or 16"),
        ({"weight_bits": 16, "activation_bits": 8, "target": "tensorrt", "rest": "float16"}, "16 bits throughout"),
        ({"weight_bits": 16, "activation_bits": 16, "target": "tensorrt"}, "--bits fp16 or bf16, for tensorrt"),
        ({"number": "float8", "weight_bits": 4, "activation_bits": 8, "target": "tensorrt"}, "8-bit floats are 8 bits"),
    ],
)
def test_what_a_target_has_no_kernels_for_is_refused(asked, said):
    with pytest.raises(ValidationError, match=said):
        QuantScheme(**asked)


@pytest.mark.parametrize("role", BODY)
@pytest.mark.parametrize("policy", ["standard", "integer", "uniform"])
def test_the_body_takes_the_bits_that_were_asked_for(role, policy):
    scheme = QuantScheme(weight_bits=4, activation_bits=6, policy=policy)
    assert scheme.weight_grid(role) == Grid(4, signed=True, symmetric=True)
    assert scheme.activation_grid(role, "conv").bits == 6
    assert scheme.activation_grid(role, "matmul").bits == 6


@pytest.mark.parametrize("role", ENDS)
def test_the_ends_keep_8_bits_where_all_is_integer_and_none_where_all_is_alike(role):
    integer = QuantScheme(weight_bits=4, activation_bits=6, policy="integer")
    uniform = QuantScheme(weight_bits=4, activation_bits=6, policy="uniform")
    assert integer.weight_grid(role).bits == integer.activation_grid(role, "linear").bits == 8
    assert (uniform.weight_grid(role).bits, uniform.activation_grid(role, "linear").bits) == (4, 6)
    assert not integer.stays_float(role)
    assert not uniform.stays_float(role)


def test_the_standard_policy_leaves_the_ends_in_float_and_the_time_embeddings_activations_in_8_bits():
    standard = QuantScheme(weight_bits=4, activation_bits=6)
    assert {role for role in (*ENDS, *BODY) if standard.stays_float(role)} == {"first", "last"}
    assert (standard.weight_grid("time").bits, standard.activation_grid("time", "linear").bits) == (4, 8)


def test_operators_that_stay_in_float_are_left_alone(tiny):
    network = tiny.unet()
    operators = quantize_operators(network, QuantScheme(weight_bits=4, activation_bits=8), role_of)
    assert {"conv_in", "conv_out"}.isdisjoint(operators)
    assert type(network.conv_in) is type(network.conv_out) is torch.nn.Conv2d


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize(
    ("target", "grid"),
    [("cpu", Grid(8, signed=False, symmetric=False)), ("tensorrt", Grid(8, signed=True, symmetric=True))],
)
def test_activation_grid_of_each_target(kind, target, grid):
    scheme = QuantScheme(weight_bits=8, activation_bits=8, target=target)
    assert scheme.activation_grid("body", kind) == grid


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_weights_and_attention_products_are_signed_and_symmetric_everywhere(target):
    scheme = QuantScheme(weight_bits=4, activation_bits=8, target=target)
    assert scheme.activation_grid("attention", "matmul") == Grid(8, signed=True, symmetric=True)
    assert scheme.weight_grid("body") == Grid(4, signed=True, symmetric=True)


def test_name_and_limits():
    assert QuantScheme(weight_bits=4, activation_bits=8).name == "W4A8"
    for wrong in ({"weight_bits": 1}, {"activation_bits": 9}, {"target": "tpu"}, {"policy": "none"}, {"extra": 1}):
        with pytest.raises(ValidationError):
            QuantScheme.model_validate({"weight_bits": 4, "activation_bits": 8} | wrong)
