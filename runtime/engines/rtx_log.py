"""What TensorRT(-RTX) compiled, read off its detailed build log: kernels, their data types, their ONNX nodes.

With ProfilingVerbosity.DETAILED the log holds a `Layers:` block, one line a kernel:

    Name: .., LayerType: correlation, Inputs: [ { .., Datatype: Int8, .. }], Constants: [..], Outputs: [..],
    TacticName: .., StreamId: 0, Metadata: [ONNX Layer: conv_in][ONNX Layer: conv_in.input0.dequantize]..

The format is documented nowhere; it was read off release 1.7, and a test holds samples of it. A kernel is one of
integers only if both operands are: some take codes and turn them into floats before they multiply. TensorRT tells it
as JSON, through an inspector of the finished plan: its documented keys are read here too, and were not tried on a GPU.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AccuQuantError
from .base import Kernel, parts_told

# Kernels that multiply: `correlation` convolves, `runtime_fusion` is a product whose kernel is chosen on the device.
ATTENTION = "gemm_mha"  # both products and the softmax in one: a `kgen` by its type, this by its name
PRODUCTS = frozenset({"correlation", "deconv", "gemm", "runtime_fusion", ATTENTION})
TYPES = ("BFloat16", "Half", "FP8", "FP4", "Int8", "Int4", "Int32", "Int64", "Bool", "Float")  # as layers name them

LOW_BIT = frozenset({"Int4", "Int8", "FP8"})

_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), (?P<rest>.*)$")
_PORTS = re.compile(r"Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], Tactic")
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_CASTS_FIRST = re.compile(r"Cast\w*(Fc|Corr)")  # a fusion is named by what it does, in order
_BYTES = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")


@dataclass(frozen=True)
class Compiled:
    """The kernels of a plan in order, and what it holds in memory.

    A kernel's precision is its first input's. A product's is that of its operands, in which it multiplies; one of
    floats and stored codes is "Half x Int4", say.
    """

    kernels: tuple[Kernel, ...]
    weights_bytes: int
    activation_bytes: int

    def precisions(self, operators: Iterable[str]) -> dict[str, str]:
        """In which precision each operator is multiplied; operators that no product kernel names are left out."""
        found = {node: k.precision for k in self.kernels if k.kind in PRODUCTS for node in k.nodes}
        wanted = set(operators)
        return {name: precision for name, precision in parts_told(found).items() if name in wanted}


def parse_log(text: str) -> Compiled:
    """Read a detailed build log.

    Raises:
        AccuQuantError: it holds no kernels; it was built without detailed verbosity, or by a release that writes
            another format.
    """
    _, found, block = text.partition("Layers:\n")
    kernels = []
    for line in block.split("\n"):
        if match := _LAYER.match(line):
            kind = ATTENTION if match["name"].startswith(f"_{ATTENTION}") else match["kind"]
            precision = _precision(match["name"], kind, match["rest"])
            kernels.append(Kernel(kind, precision, tuple(_NODE.findall(match["rest"]))))
        elif line.startswith("I/O Tensors:"):
            break
    if not kernels:
        problem = "an empty list of kernels" if found else "no list of kernels"
        raise AccuQuantError(f"the compiler's log holds {problem}; accuquant reads the format of TensorRT-RTX 1.7")
    sizes = {kind: int(count) for kind, count in _BYTES.findall(text)}
    return Compiled(tuple(kernels), sizes.get("Weights", 0), sizes.get("Activation", 0))


def _precision(name: str, kind: str, rest: str) -> str:
    """In which type a kernel computes."""
    ports = _PORTS.match(rest)
    inputs, constants, outputs = ([], [], []) if ports is None else (_TYPE.findall(part) for part in ports.groups())
    given = [*inputs, *constants]
    first = given[0] if given else "-"
    if kind not in PRODUCTS or not given:
        return first
    widened = kind == "runtime_fusion" and _CASTS_FIRST.search(name) is not None
    if first in LOW_BIT and first in given[1:] and not widened:
        return first
    multiplied = next(t for t in [*given, *outputs] if t not in LOW_BIT)
    stored = next((t for t in constants if t in LOW_BIT), None)
    return multiplied if stored is None else f"{multiplied} x {stored}"


def parse_layers(text: str) -> Compiled:
    """Read an inspector's JSON: `Layers` with `Inputs`, whose type stands in `Datatype` or, before 11, in words.

    Raises:
        AccuQuantError: it is no such JSON, or was built without detailed verbosity.
    """
    try:
        layers = json.loads(text)["Layers"]
        kernels = tuple(
            Kernel(row["LayerType"], _type(row["Inputs"]), tuple(_NODE.findall(row.get("Metadata", ""))))
            for row in layers
        )
    except (ValueError, KeyError, TypeError) as error:
        raise AccuQuantError(f"the inspector tells no layers in the form that accuquant reads: {error!r}") from None
    return Compiled(kernels, 0, 0)


def _type(inputs: list[dict[str, str]]) -> str:
    """Of the first input: `Datatype: Int8`, or `Format/Datatype: Thirty-two wide channel vectorized Int8 format`."""
    if not inputs:
        return "-"
    said = inputs[0].get("Datatype") or inputs[0]["Format/Datatype"]
    words = {"FP16": "Half", "FP32": "Float", "INT8": "Int8"}
    return next((known for known in TYPES if known in said), next((k for w, k in words.items() if w in said), "-"))
