"""ONNX Runtime's dynamic quantizer, run in an environment of its own by yardsticks.py and bench_peers.py.

python onnxruntime_dynamic.py GRAPH.onnx DATA.npz OUT.onnx SETTINGS      settings as JSON: convolutions (quantize them
                                                                         too), keep (nodes left in float)

Ranges of activations are found at every call, so the data is not looked at. Of convolutions its kernel takes uint8
weights only.
"""

import json
import sys
import tempfile
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def main(graph: str, data: str, out: str, settings: str) -> None:
    asked = json.loads(settings)
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            out,
            op_types_to_quantize=["MatMul", *(["Conv"] if asked["convolutions"] else [])],
            per_channel=not asked["convolutions"],
            weight_type=QuantType.QUInt8 if asked["convolutions"] else QuantType.QInt8,
            nodes_to_exclude=asked["keep"],
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
