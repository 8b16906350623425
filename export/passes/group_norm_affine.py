"""GroupNormalization as a per-channel affine, which keeps OpenVINO in its channels-last layout.

With means over the positions of each channel, then over the channels of each group (G groups of C/G channels):

    m = mean_HW(x),  q = mean_HW(x^2)                          (N, C, 1, 1)
    mu = mean_group(m),  var = mean_group(q) - mu^2            (N, G, 1)
    A = gamma / sqrt(var + eps),  B = beta - mu A,  y = x A + B

OpenVINO lowers GroupNormalization through a Reshape to (N, G, -1) that forces a layout change before and after every
norm; on small U-Nets that was 45 % of the step. q is taken as ReduceL2(x)^2 / HW, so that x^2 is never written to
memory, which is 8 % of the reference model's W4A8 step at batch 8. ONNX Runtime's CPU provider has no kernel for the
operator; this form is as fast there as its definition. TensorRT fuses it as it is.

Means of a concatenation's channels are those of its parts. A U-Net's shortcut was normed on its way down already, so
that half of what is read for the means on the way up need not be.

Requires: opset 21 GroupNormalization (scale and bias per channel) on 4-D inputs of known channel count and size.
Ensures: none is left; equal to the operator up to float32 rounding (variance by E[x^2] - E[x]^2).
"""

import math

import numpy as np
import onnx_ir as ir

from ...runtime.errors import AccuQuantError
from .insertion import constant, drop_unused, insert_before

Means = dict[ir.Value, tuple[ir.Value, ir.Value]]  # of values met: m and q


def group_norm_affine(model: ir.Model) -> int:
    """Rewrite in place; returns how many norms were rewritten.

    Raises:
        AccuQuantError: a norm whose input is not 4-D and of known size, or whose scale is not a constant; names the
            node.
    """
    norms = [node for node in model.graph if node.op_type == "GroupNormalization"]
    means: Means = {}
    for norm in norms:
        _rewrite(model, norm, means)
    return len(norms)


def _means(
    model: ir.Model, norm: ir.Node, x: ir.Value, positions: int, prefix: str, known: Means
) -> tuple[ir.Value, ir.Value]:
    """m and q of x, (N, C, 1, 1) each, in front of `norm`; those in `known` of values met before."""
    if x in known:
        return known[x]

    def node(op: str, name: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return insert_before(model, norm, op, inputs, f"{prefix}.{name}", **attributes)

    producer = x.producer()
    if producer is not None and producer.op_type == "Concat" and producer.attributes.get_int("axis", 0) == 1:
        parts = [part for part in producer.inputs if part is not None]
        found = [_means(model, norm, part, positions, f"{prefix}.part{n}", known) for n, part in enumerate(parts)]
        m = node("Concat", "mean", *(mean for mean, _ in found), axis=1)
        q = node("Concat", "square_mean", *(square for _, square in found), axis=1)
    else:
        root = constant(model, f"{prefix}.root", np.full((), positions**-0.5, np.float32))
        spatial = constant(model, f"{prefix}.spatial", np.array([2, 3], np.int64))
        m = node("GlobalAveragePool", "mean", x)
        rms = node("Mul", "rms", node("ReduceL2", "length", x, spatial, keepdims=1), root)
        q = node("Mul", "square_mean", rms, rms)
    known[x] = m, q
    return m, q


def _rewrite(model: ir.Model, norm: ir.Node, means: Means) -> None:
    x, scale, bias = norm.inputs
    if x is None or scale is None or bias is None or scale.const_value is None or bias.const_value is None:
        raise AccuQuantError(f"norm {norm.name}: scale and bias must be constants of the graph")
    size = x.shape[2:] if x.shape is not None and len(x.shape) == 4 else ()
    if not size or not all(isinstance(side, int) for side in size):
        raise AccuQuantError(f"norm {norm.name}: input of shape {x.shape}; (N, C, H, W) of known H and W is expected")
    groups = norm.attributes["num_groups"].as_int()
    eps = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    gamma, beta = scale.const_value.numpy(), bias.const_value.numpy()
    per_group = len(gamma) // groups
    prefix = norm.name or norm.outputs[0].name

    def fixed(name: str, value: np.ndarray) -> ir.Value:
        return constant(model, f"{prefix}.{name}", value)

    def node(op: str, name: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return insert_before(model, norm, op, inputs, f"{prefix}.{name}", **attributes)

    grouped = fixed("grouped", np.array([0, groups, per_group], np.int64))
    channels = fixed("channels", np.array([0, groups * per_group, 1, 1], np.int64))
    last = fixed("last", np.array([2], np.int64))
    m, q = _means(model, norm, x, math.prod(size), prefix, means)  # type: ignore[arg-type]
    mu = node("ReduceMean", "group_mean", node("Reshape", "mean_grouped", m, grouped), last, keepdims=1)
    second = node("ReduceMean", "group_square", node("Reshape", "square_grouped", q, grouped), last, keepdims=1)
    # Rounding may leave a variance of -1e-9 on a constant group.
    floor = fixed("zero", np.zeros((), np.float32))
    var = node("Max", "variance", node("Sub", "spread", second, node("Mul", "mean_squared", mu, mu)), floor)
    deviation = node("Sqrt", "deviation", node("Add", "stable", var, fixed("eps", np.full((), eps, np.float32))))
    a = node("Div", "a", fixed("gamma", gamma.reshape(1, groups, per_group)), deviation)
    b = node("Sub", "b", fixed("beta", beta.reshape(1, groups, per_group)), node("Mul", "mean_a", mu, a))
    scaled = node("Mul", "scaled", x, node("Reshape", "a_channels", a, channels))
    y = node("Add", "shifted", scaled, node("Reshape", "b_channels", b, channels))
    y.shape, y.type = norm.outputs[0].shape, norm.outputs[0].type
    ir.convenience.replace_all_uses_with(norm.outputs[0], y)
    model.graph.remove(norm, safe=True)
    for value in (scale, bias):
        drop_unused(model, value)
