"""What TensorRT(-RTX) compiled, read off its detailed build log: kernels, their data types, their ONNX nodes.

With ProfilingVerbosity.DETAILED the log holds a `Layers:` block, one line a kernel:

    Name: .., LayerType: correlation, Inputs: [ { .., Datatype: Int8, .. }], Constants: [..], Outputs: [..],
    TacticName: .., StreamId: 0, Metadata: [ONNX Layer: conv_in][ONNX Layer: conv_in.input0.dequantize]..

The format is documented nowhere; it was read off release 1.7, and a test holds samples of it. TensorRT tells the same
as JSON, through an inspector of the finished plan: its documented keys are read here too, and were not tried on a GPU.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AccuQuantError
from .base import Kernel

# Kernels that multiply: `correlation` is a convolution, `runtime_fusion` a matmul whose kernel is chosen on the device.
PRODUCTS = frozenset({"correlation", "deconv", "gemm", "runtime_fusion"})
TYPES = ("BFloat16", "Half", "FP8", "FP4", "Int8", "Int4", "Int32", "Int64", "Bool", "Float")  # as layers name them

LOW_BIT = frozenset({"Int4", "Int8", "FP8"})

_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), (?P<rest>.*)$")
_FIRST = re.compile(r"\[ \{.*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_STORED = re.compile(rf"Datatype: ({'|'.join(sorted(LOW_BIT))})\b")
_BYTES = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")


@dataclass(frozen=True)
class Compiled:
    """The kernels of a plan in order, and what it holds in memory.

    A kernel's precision is its first input's; a product of floats and stored codes is "Half x Int4", say.
    """

    kernels: tuple[Kernel, ...]
    weights_bytes: int
    activation_bytes: int

    def precisions(self, operators: Iterable[str]) -> dict[str, str]:
        """In which precision each operator is multiplied; operators that no product kernel names are left out."""
        wanted = set(operators)
        products = (k for k in self.kernels if k.kind in PRODUCTS)
        return {node: kernel.precision for kernel in products for node in kernel.nodes if node in wanted}


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
            inputs, _, constants = match["rest"].partition("Constants: ")
            first = _FIRST.search(inputs) or _FIRST.search(constants)
            precision = first["type"] if first else "-"
            stored = _STORED.search(constants.partition("Outputs: ")[0])
            if stored and match["kind"] in PRODUCTS and precision not in LOW_BIT:
                precision = f"{precision} x {stored[1]}"
            kernels.append(Kernel(match["kind"], precision, tuple(_NODE.findall(match["rest"]))))
        elif line.startswith("I/O Tensors:"):
            break
    if not kernels:
        problem = "an empty list of kernels" if found else "no list of kernels"
        raise AccuQuantError(f"the compiler's log holds {problem}; accuquant reads the format of TensorRT-RTX 1.7")
    sizes = {kind: int(count) for kind, count in _BYTES.findall(text)}
    return Compiled(tuple(kernels), sizes.get("Weights", 0), sizes.get("Activation", 0))


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
