"""What NVIDIA's compiler refuses, and what it accepts and multiplies in float: why graphs are lowered as they are.

Each case departs in one thing from a quantized convolution or linear layer that becomes an integer kernel. If one of
these tests fails, a new release has lifted a limit or set one.
"""

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from accuquant.runtime.engines.compile_plan import CompileRequest, compile_plan
from accuquant.runtime.errors import AccuQuantError
from onnx import numpy_helper

pytestmark = pytest.mark.usefixtures("rtx")

CODES = np.random.default_rng(0).integers(-8, 8, (8, 8, 3, 3)).astype(np.int8)
SQUARE = CODES[:, :, 0, 0]  # a linear layer's
SCALES = np.full(8, 0.01, np.float32)
INT4, UINT4, FLOAT8, FLOAT8_RANGE = (
    np.dtype(getattr(ml_dtypes, name)) for name in ("int4", "uint4", "float8_e4m3fn", "float8_e5m2")
)
CONSTANTS = {
    "codes": CODES,
    "scales": SCALES,
    "fine": SCALES / 16,
    "zeros": np.zeros(8, np.int8),
    "s": np.float32(0.02),
    "other": np.float32(0.05),
    "z": np.int8(0),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "bias_codes": np.arange(8, dtype=np.int32),
    "rows": np.array([-1, 64, 8]),
    "heads": np.array([-1, 64, 2, 4]),
    "picture": np.array([-1, 8, 8, 8]),
}
INPUT = "[quantize] q = QuantizeLinear(x, s, z) [dequantize] d = DequantizeLinear(q, s, z)"
WEIGHT = "[weight] w = DequantizeLinear <axis = 0> (codes, scales)"
REQUANTIZED = """
    [weight] v = DequantizeLinear <axis = 0> (codes, scales)
    [requantize] r = QuantizeLinear <axis = 0> (v, fine, zeros)
    w = DequantizeLinear <axis = 0> (r, fine, zeros)"""
CONV = "[product] y = Conv <pads = [1, 1, 1, 1]> (d, w)"
MATMUL = "[product] y = MatMul(d, w)"

THREE_SETS_OF_HEADS = """
    [product] p = MatMul(d, w)
    f, g, h = Split <axis = 2, num_outputs = 3> (p)
    fh = Reshape(f, heads) a = Transpose <perm = [0, 2, 1, 3]> (fh)
    gh = Reshape(g, heads) b = Transpose <perm = [0, 2, 1, 3]> (gh)
    hh = Reshape(h, heads) c = Transpose <perm = [0, 2, 1, 3]> (hh)
    ab = Mul(a, b) m = Add(ab, c) y = Reshape(m, picture)"""


def per_block(axis, size):
    return f"[weight] w = DequantizeLinear <axis = {axis}, block_size = {size}> (codes, scales)"


@pytest.fixture
def graph(tmp_path):
    """`graph(nodes, name=value)`: on disk, a graph of x and y (batch, 8, 8, 8), in which constants may be others."""

    def write(*nodes, given="float[batch, 8, 8, 8] x", **changed):
        body = "\n".join(nodes)
        head = '<ir_version: 10, opset_import: ["": 21]> g'
        model = onnx.parser.parse_model(f"{head} ({given}) => (float[batch, 8, 8, 8] y) {{ {body} }}")
        read = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in (CONSTANTS | changed).items()
            if name in read and name not in given
        )
        onnx.save(model, tmp_path / "m.onnx")
        return tmp_path / "m.onnx"

    return write


def multiplied(path, gpu="default"):
    return compile_plan(CompileRequest(path, gpu)).precisions(["product"])["product"]


# -- what the cases depart from --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "changed"),
    [
        pytest.param((INPUT, WEIGHT, CONV), {}, id="conv"),
        pytest.param((INPUT, REQUANTIZED, CONV), {"codes": CODES.astype(INT4)}, id="requantized-int4"),
        pytest.param((INPUT, WEIGHT.replace("0", "1"), MATMUL), {"codes": SQUARE}, id="matmul"),
    ],
)
def test_our_forms_are_integer_kernels(nodes, changed, graph):
    assert multiplied(graph(*nodes, **changed)) == "Int8"


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "changed", "words"),
    [
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(INT4)},
            r"CHECK\(dtype == W\.type\(\)\) failed",
            id="int4-into-int8-conv",
        ),
        pytest.param(
            (INPUT, REQUANTIZED, CONV),
            {"codes": CODES.astype(INT4), "fine": SCALES},
            r"Mismatched type for tensor r, i8 vs\. expected type:int4",
            id="int4-requantized-at-its-own-scale",
        ),
        pytest.param(
            (REQUANTIZED, "[product] y = Conv <pads = [1, 1, 1, 1]> (x, w)"),
            {
                "codes": CODES[:7, :7].astype(INT4),
                "scales": SCALES[:7],
                "fine": SCALES[:7] / 16,
                "zeros": np.zeros(7, np.int8),
                "given": "float[batch, 7, 8, 8] x",
            },
            "Sub-byte quantization with odd tensor volume is not supported",
            id="odd-number-of-int4",
        ),
        pytest.param(
            (per_block(1, 4), "[product] y = Conv <pads = [1, 1, 1, 1]> (x, w)"),
            {"codes": CODES.astype(INT4), "scales": np.full((8, 2, 3, 3), 0.01, np.float32)},
            "The blocking dimension must be the last or second to last dimension",
            id="int4-conv-by-blocks",
        ),
        pytest.param(
            (INPUT, per_block(0, 4), MATMUL),
            {"codes": SQUARE.astype(INT4), "scales": np.full((2, 8), 0.01, np.float32)},
            r"CHECK\(is_constant\(\)\) failed",
            id="int4-by-blocks-with-int8-activations",
        ),
        pytest.param(
            (INPUT, "w = DequantizeLinear(codes, s)", MATMUL),
            {"codes": SQUARE.astype(INT4)},
            "Input and filter have to be the same type",
            id="int4-per-tensor-with-int8-activations",
        ),
        pytest.param(
            ("w = Cast <to = 1> (codes) [product] y = Conv <pads = [1, 1, 1, 1]> (x, w)",),
            {"codes": CODES.astype(INT4)},
            "has datatype Int4 but is not consumed by",
            id="int4-cast",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(FLOAT8)},
            r"CHECK\(dtype == W\.type\(\)\) failed",
            id="int8-times-float8",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(np.uint8)},
            "Found unsupported input type of UINT8",
            id="uint8-weights",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(UINT4)},
            "Failed to import initializer: codes",
            id="uint4-weights",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(np.int16)},
            "Failed to import initializer: codes",
            id="int16-weights",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(FLOAT8_RANGE)},
            "Failed to import initializer: codes",
            id="float8-e5m2-weights",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"z": np.int8(3)},
            "node quantize: .*Non-zero zero point is not supported",
            id="zero-point",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"z": np.uint8(128)},
            "node quantize: .*Non-zero zero point is not supported",
            id="uint8-activations",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV), {"s": np.float32(0)}, "Scale coefficients must all be positive", id="scale-of-zero"
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"s": np.float32(np.nan)},
            "Scale coefficients must all be positive",
            id="scale-not-a-number",
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"scales": SCALES * (np.arange(8) != 3)},
            "Scale coefficients must all be positive",
            id="scale-of-zero-in-one-channel",
        ),
        pytest.param(
            (INPUT, WEIGHT, "[bias] b = DequantizeLinear <axis = 0> (bias_codes, scales)", CONV.replace("w)", "w, b)")),
            {},
            "node bias: .*input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8",
            id="int32-bias",
        ),
        pytest.param(
            ("h = Cast <to = 10> (x) [sum] y = Add(x, h)",),
            {},
            "node sum: .*same input types.*Float and Half",
            id="two-types-in-a-sum",
        ),
        pytest.param(
            (
                "q = QuantizeLinear(x, s, z)",
                "[product] p = ConvInteger <pads = [1, 1, 1, 1]> (q, codes) y = Cast <to = 1> (p)",
            ),
            {},
            "node product: ConvInteger is not supported",
            id="conv-integer",
        ),
        pytest.param(
            ("q, ds, dz = DynamicQuantizeLinear(x) y = DequantizeLinear(q, ds, dz)",),
            {},
            "DynamicQuantizeLinear is not",
            id="dynamic-quantization",
        ),
    ],
)
def test_it_is_refused_in_the_compilers_own_words(nodes, changed, words, graph):
    with pytest.raises(AccuQuantError, match=rf"refused it for default: .*{words}"):
        compile_plan(CompileRequest(graph(*nodes, **changed)))


@pytest.mark.parametrize(
    ("nodes", "changed", "gpu", "words"),
    [
        pytest.param((INPUT, REQUANTIZED, CONV), {"codes": CODES.astype(INT4)}, "sm75", "int4", id="int4-on-turing"),
        pytest.param(
            ("h = Cast <to = 16> (x) n = Neg(h) y = Cast <to = 1> (n)",), {}, "sm75", "b16", id="bfloat16-on-turing"
        ),
        pytest.param(
            (INPUT, WEIGHT, CONV),
            {"codes": CODES.astype(FLOAT8), "z": np.zeros((), FLOAT8)},
            "sm86",
            "fp8_e4m3",
            id="float8-on-ampere",
        ),
    ],
)
def test_a_gpu_without_the_type_is_refused_by_its_name(nodes, changed, gpu, words, graph):
    with pytest.raises(AccuQuantError, match=f"for target.* {gpu}, because .*HW-specific datatypes: {words}"):
        compile_plan(CompileRequest(graph(*nodes, **changed), gpu))


def test_batches_that_do_not_rise_are_refused(graph):
    with pytest.raises(AccuQuantError, match="MIN<=OPT<=MAX"):
        compile_plan(CompileRequest(graph(INPUT, WEIGHT, CONV), batches=(4, 2, 1)))


def test_a_graph_that_kills_the_compiler_kills_only_the_child(graph):
    path = graph(INPUT, WEIGHT, CONV, given="float[batch, 8, 8, 8] x, float s")
    with pytest.raises(AccuQuantError, match=r"crashed \(SIG"):
        compile_plan(CompileRequest(path))


def test_mistakes_are_one_sentence(graph, tmp_path):
    path = graph(INPUT, WEIGHT, CONV)
    with pytest.raises(AccuQuantError, match=r"unknown GPU target 'sm90'; known: default"):
        compile_plan(CompileRequest(path, "sm90"))
    with pytest.raises(AccuQuantError, match="took longer than 0 s"):
        compile_plan(CompileRequest(path), seconds=0.01)
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(AccuQuantError, match=r"bad\.onnx: TensorRT-RTX refused it"):
        compile_plan(CompileRequest(tmp_path / "bad.onnx"))


# -- accepted, and multiplied in float -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "changed", "gpu"),
    [
        pytest.param((INPUT, WEIGHT, CONV), {"s": np.full(1, 0.02, np.float32)}, "default", id="scale-of-rank-1"),
        pytest.param((INPUT, WEIGHT, CONV), {}, "sm75", id="conv-on-turing"),
        pytest.param(
            ("q = QuantizeLinear <axis = 1> (x, s, zeros) d = DequantizeLinear <axis = 1> (q, s, zeros)", WEIGHT, CONV),
            {"s": SCALES},
            "default",
            id="scale-per-input-channel",
        ),
        pytest.param(
            (INPUT, CONV.replace("w", "codes")), {"codes": CODES.astype(np.float32)}, "default", id="float-weights"
        ),
        pytest.param((WEIGHT, CONV.replace("d,", "x,")), {}, "default", id="float-activations"),
        pytest.param(
            (INPUT, WEIGHT, "m = Relu(d)", CONV.replace("d,", "m,")), {}, "default", id="relu-behind-dequantize"
        ),
        pytest.param(
            (
                INPUT,
                WEIGHT,
                'm = Resize <mode = "nearest"> (d, , twice)',
                "[product] y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (m, w)",
            ),
            {},
            "default",
            id="resize-behind-dequantize",
        ),
        pytest.param(
            (
                INPUT,
                "e = QuantizeLinear(x, other, z) f = DequantizeLinear(e, other, z) m = Concat <axis = 1> (d, f)",
                WEIGHT,
                CONV.replace("d,", "m,"),
            ),
            {"codes": np.concatenate([CODES, CODES], 1)},
            "default",
            id="two-scales-before-concat",
        ),
        pytest.param(
            (INPUT, WEIGHT.replace("0", "1"), CONV.replace("Conv", "ConvTranspose")),
            {},
            "default",
            id="transposed-conv",
        ),
        pytest.param((INPUT, WEIGHT, MATMUL), {"codes": SQUARE}, "default", id="matmul-scaled-by-its-input-channels"),
        pytest.param(
            ("tokens = Reshape(x, rows)", INPUT.replace("x", "tokens"), WEIGHT.replace("0", "1"), THREE_SETS_OF_HEADS),
            {"codes": np.tile(SQUARE, 3), "scales": np.tile(SCALES, 3)},
            "default",
            id="queries-keys-and-values-in-one",
        ),
    ],
)
def test_it_is_accepted_and_multiplied_in_float(nodes, changed, gpu, graph):
    """No complaint, and no integers. Only the kernels tell."""
    assert multiplied(graph(*nodes, **changed), gpu).split(" x ")[0] in {"Float", "Half"}


@pytest.mark.parametrize(
    ("nodes", "changed", "kernel"),
    [
        pytest.param((INPUT, WEIGHT, CONV), {"z": np.uint8(0)}, "Int8", id="uint8-taken-for-int8"),
        pytest.param((INPUT, WEIGHT, CONV), {"s": np.float32(np.inf)}, "Int8", id="infinite-scale"),
        pytest.param(
            (INPUT, WEIGHT.replace("0", "1"), MATMUL),
            {"codes": SQUARE.astype(INT4), "z": np.zeros((), INT4)},
            "Int4",
            id="int4-activations",
        ),
    ],
)
def test_it_is_accepted_and_not_to_be_trusted(nodes, changed, kernel, graph):
    """Codes above 127 would saturate, or all be 0; products of 4-bit numbers are seen here and promised nowhere."""
    assert multiplied(graph(*nodes, **changed)) == kernel
