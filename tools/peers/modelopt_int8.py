"""ModelOpt's ONNX quantization, run in an environment of its own by yardsticks.py.

python modelopt_int8.py GRAPH.onnx DATA.npz OUT.onnx SETTINGS      settings as JSON: calibration (max or entropy),
                                                                   keep (nodes left in float)
"""

import json
import sys

import numpy as np
from modelopt.onnx.quantization import quantize


def main(graph: str, data: str, out: str, settings: str) -> None:
    asked, held = json.loads(settings), np.load(data)
    quantize(
        onnx_path=graph,
        quantize_mode="int8",
        calibration_method=asked["calibration"],
        calibration_data={name: held[name] for name in held},
        calibration_eps=["cpu"],
        nodes_to_exclude=asked["keep"],
        high_precision_dtype="fp32",
        output_path=out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
