"""Precision asked and precision got, operator by operator, in the words of whoever compiled the graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .bundle import OperatorFacts
from .engines.base import Engine, Kernel, parts_told

# What engines call a kernel that multiplies few bits: OpenVINO i8 and u8, TensorRT Int8, Int4 and FP8.
LOW_BIT = frozenset({"i8", "u8", "Int8", "Int4", "FP8"})
# And, in lower case, a kernel that multiplies: the layers of OpenVINO, ONNX Runtime's operators, TensorRT's kinds.
MULTIPLY = ("conv", "fullyconnected", "matmul", "matrixmultiply", "gemm", "correlation", "runtime_fusion")
LOOKED_UP = "looked up"  # what is said of operators that the graph has in its table of timesteps


@dataclass(frozen=True)
class Verdict:
    """What became of one operator in one engine; `why` is empty if it got what was asked."""

    operator: str
    asked: str
    stored: str
    got: str
    why: str


def operator_precisions(engine: Engine, operators: Iterable[str]) -> dict[str, str]:
    """The precision in which the engine says it runs each operator; empty if it keeps no such record.

    Engines report fused nodes by derived names, `conv_out/WithoutBiases` say; what stands before the slash is ours. A
    kernel that carries an operator's own name is believed before one that carries a derived one, and before both one
    that multiplies: TensorRT-RTX names an operator by the kernels that scale its result as well. What the engine kept
    in float and tells of under a neighbour's name alone, as OpenVINO does without AVX-512, is in float.
    """
    wanted, kernels = set(operators), engine.kernels()
    found: dict[str, str] = {}
    for known in (kernels, [kernel for kernel in kernels if multiplies(kernel)]):
        reported = [(node, kernel.precision) for kernel in known for node in kernel.nodes]
        found |= {node.partition("/")[0]: precision for node, precision in reported} | dict(reported)
    told = dict.fromkeys(engine.kept_in_float, "f32") | parts_told(found)
    return {name: precision for name, precision in told.items() if name in wanted}


def multiplies(kernel: Kernel) -> bool:
    return any(word in kernel.kind.lower() for word in MULTIPLY)


def judge(
    operators: Mapping[str, OperatorFacts],
    got: Mapping[str, str],
    kept_in_float: Mapping[str, str] = MappingProxyType({}),
) -> list[Verdict]:
    """One verdict an operator, in the manifest's order.

    An operator with quantized inputs asks for a low-bit kernel, one whose weight alone is quantized for a float one.
    `kept_in_float` holds the engine's own reasons.
    """
    verdicts = []
    for name, facts in operators.items():
        number = "fp" if facts.weight_container == "float8" else "int"
        weights = [] if facts.weight_bits is None else [f"{number}{facts.weight_bits} weights"]
        precision = LOOKED_UP if facts.in_table else got.get(name, "")
        if not precision:
            why = kept_in_float.get(name, "no kernel of that name: the engine reports none, or fused it away")
        elif precision == LOOKED_UP or not facts.inputs:
            why = ""
        elif precision in LOW_BIT:
            alike = (precision == "FP8") == facts.inputs[0].startswith("fp")
            why = "" if alike else "the engine multiplies other numbers than were calibrated"
        else:
            why = kept_in_float.get(name, "the engine left its Q/DQ unfused and multiplies in float")
        asked = ", ".join([*weights, *([" x ".join(facts.inputs)] if facts.inputs else [])])
        verdicts.append(Verdict(name, asked, facts.weight_container, precision or "not reported", why))
    return verdicts
