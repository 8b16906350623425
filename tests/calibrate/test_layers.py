"""A kernel that writes 8 bits, in the simulation; and which layers are quantized, and which cannot be."""

import re

import pytest
import torch
from accuquant.calibrate.grid import Grid
from accuquant.calibrate.initialise import initialise
from accuquant.calibrate.layers import QuantizedConv2d, quantization, quantize_operators
from accuquant.calibrate.recipe import Recipe, freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.runtime.errors import AccuQuantError
from torch import nn

WEIGHT, UNSIGNED = Grid(4, True, True), Grid(8, False, False)


@pytest.fixture
def writer():
    """A convolution whose inputs, weight and outputs have plausible ranges."""
    conv = nn.Conv2d(3, 5, 3)
    operator = QuantizedConv2d("c", "body", conv, WEIGHT, UNSIGNED, output=UNSIGNED)
    x = torch.randn(2, 3, 6, 6)
    y = conv(x)
    operator.inputs[0].set(*UNSIGNED.affine(x.min(), x.max()))
    operator.output.set(*UNSIGNED.affine(y.min(), y.max()))
    weight = operator.weight_quantizer
    weight.set_scale(weight.weight.abs().flatten(1).amax(1).reshape(weight.scale.shape) / WEIGHT.q_max)
    operator.active = True
    return operator, x


def test_what_is_written_is_the_kernels_integer_arithmetic(writer):
    """q_y = clamp(round(s_x s_w (sum (q_x - z) q_w + q_b) / s_y) + z_y), with an integer bias."""
    operator, x = writer
    x_codes, x_scale = operator.inputs[0](x)
    w_codes, w_scale = operator.weight_codes()
    step = (x_scale * w_scale)[:, None, None]
    total = nn.functional.conv2d(x_codes.double(), w_codes.double())
    total = total + torch.round(operator.conv.bias / (x_scale * w_scale)).double()[:, None, None]
    zero = operator.output.zero_point
    codes = (torch.round(total * step / operator.output.scale) + zero).clamp(0, 255)
    expected = (codes - zero) * operator.output.scale
    # A sum in float32 may fall on the other side of a tie, one code away.
    wrong = (operator(x) - expected).abs() > 1e-4 * operator.output.scale
    assert wrong.float().mean() < 0.01


def test_the_output_grid_is_learned_and_lets_gradients_through(writer):
    operator, x = writer
    x.requires_grad_(True)
    operator.learn_bias()
    operator(x).square().sum().backward()
    for gradient in (x.grad, operator.output.log_scale.grad, operator.shift.grad, operator.inputs[0].log_scale.grad):
        assert gradient.abs().sum() > 0


def test_only_convolutions_for_onnxruntime_write_8_bits(tiny, tmp_path):
    from accuquant.calibrate.families.ddim import role_of

    network, plan = tiny.unet(), trace("ddim", tiny.NOISE_SCHEDULE, 4)
    # 4-bit activations: what is written is 8 bits all the same, since who reads it rounds again.
    scheme = QuantScheme(weight_bits=4, activation_bits=4, target="onnxruntime")
    operators = quantize_operators(network, scheme, role_of)
    teacher = simulate(network, plan, range(2), tiny.SHAPE)
    initialise(network, operators, plan, teacher, "min-max")
    assert {name for name, op in operators.items() if op.output is not None} == {
        name for name, op in operators.items() if op.kind == "conv"
    }
    recipe = freeze(operators, scheme, {})
    recipe.save(tmp_path)
    assert Recipe.load(tmp_path).facts == recipe.facts
    conv = operators["mid.block_1.conv1"]
    assert recipe.facts.operators["mid.block_1.conv1"].output.bits == 8
    with quantization(operators, active=False):
        seen = []
        handle = conv.register_forward_hook(lambda _, __, y: seen.append(y))
        network(teacher.states[0], torch.full((2,), plan.steps[0].timestep))
        handle.remove()
    q = conv.output
    low, high = (0 - q.zero_point) * q.scale, (255 - q.zero_point) * q.scale
    assert low <= seen[0].min() + q.scale
    assert high >= seen[0].max() - q.scale


class Upsampling(nn.Module):
    """A transposed convolution, one that pads by reflection, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.mid = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 4)])


def role(name):
    return "last" if name == "up" else "first" if name == "mid.0" else "body"


def scheme(**asked):
    return QuantScheme(weight_bits=8, activation_bits=8, **asked)


def test_what_the_policy_leaves_in_float_may_be_of_any_kind():
    assert quantize_operators(Upsampling(), scheme(), role).keys() == {"mid.1"}


def test_a_kind_without_a_quantized_form_is_named_with_what_has_one():
    said = r"layer up is a ConvTranspose2d, .*Conv2d, Linear and products of attention have one.*\(--in-float up\)"
    with pytest.raises(AccuQuantError, match=said):
        quantize_operators(Upsampling(), scheme(policy="uniform"), role)


def test_padding_of_other_than_zeros_is_named_with_what_is_allowed():
    asked = scheme(policy="uniform", in_float=("up",))
    said = r"layer mid\.0 pads with padding_mode 'reflect'; only 'zeros' .*\(--in-float mid\.0\)"
    with pytest.raises(AccuQuantError, match=said):
        quantize_operators(Upsampling(), asked, role)


@pytest.mark.parametrize("patterns", [("up", "mid.0"), ("up", "*.0"), ("[tu]*", "m*0")])
def test_patterns_leave_layers_in_float(patterns):
    made = quantize_operators(Upsampling(), scheme(policy="uniform", in_float=patterns), role)
    assert made.keys() == {"mid.1"}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("mid.2", r"\(near it are mid\.\d, mid\.\d\)"),
        ("mid.?.conv", r"\(near it are"),
        ("zzz", r"\(no name is near it\)"),
    ],
)
def test_a_pattern_that_matches_no_layer_is_named_with_what_is_near_it(pattern, near):
    said = rf"layer {re.escape(pattern)} is to stay in float, and no layer .*{near}.*--in-float 'mid\.\*'"
    with pytest.raises(AccuQuantError, match=said):
        quantize_operators(Upsampling(), scheme(in_float=("up", pattern)), role)


def test_a_network_of_which_nothing_is_left_says_so():
    said = "to quantize: of 3 none is left by policy standard .*choose another --policy, or"
    with pytest.raises(AccuQuantError, match=said):
        quantize_operators(Upsampling(), scheme(in_float=("mid.*",)), role)
