"""What TensorRT(-RTX) compiled, read off its detailed build log: kernels, their data types, their ONNX nodes.

With ProfilingVerbosity.DETAILED the log holds a `Layers:` block, one line a kernel:

    Name: .., LayerType: correlation, Inputs: [ { .., Datatype: Int8, .. }], Constants: [..], Outputs: [..],
    TacticName: .., StreamId: 0, Metadata: [ONNX Layer: conv_in][ONNX Layer: conv_in.input0.dequantize]..

The format is documented nowhere; it was read off release 1.7, and a test holds samples of it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AccuQuantError
from .base import Kernel

# Kernels that multiply: `correlation` is a convolution, `runtime_fusion` a matmul whose kernel is chosen on the device.
PRODUCTS = frozenset({"correlation", "deconv", "gemm", "runtime_fusion"})

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
