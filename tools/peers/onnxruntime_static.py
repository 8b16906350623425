"""ONNX Runtime's static quantizer, run in an environment of its own by yardsticks.py.

python onnxruntime_static.py GRAPH.onnx DATA.npz OUT.onnx SETTINGS      settings as JSON: calibration, symmetric,
                                                                        keep (nodes left in float)

Weights have a scale per output channel. `symmetric` gives activations int8 without zero points and leaves biases and
results in float, which is what TensorRT takes; otherwise they are uint8, as ONNX Runtime's own kernels like them.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

OPERATORS = ["Conv", "Gemm", "MatMul"]


class Samples(CalibrationDataReader):
    def __init__(self, data: str) -> None:
        held = np.load(data)
        self.rows = iter([{name: held[name][i : i + 1] for name in held} for i in range(len(held["t"]))])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def main(graph: str, data: str, out: str, settings: str) -> None:
    asked = json.loads(settings)
    symmetric = asked["symmetric"]
    options = {"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric}
    options["QDQOpTypePerChannelSupportToAxis"] = {"MatMul": 1, "Gemm": 0}
    if symmetric:
        options["OpTypesToExcludeOutputQuantization"] = OPERATORS
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            Samples(data),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[asked["calibration"]],
            nodes_to_exclude=asked["keep"],
            extra_options=options,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
