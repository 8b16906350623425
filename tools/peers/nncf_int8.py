"""NNCF's post-training quantization, run in an environment of its own by yardsticks.py.

python nncf_int8.py GRAPH.onnx DATA.npz OUT.xml SETTINGS      settings as JSON: preset, model_type,
                                                              fast_bias_correction, keep (nodes left in float)
"""

import json
import sys

import nncf
import numpy as np
import openvino as ov


def main(graph: str, data: str, out: str, settings: str) -> None:
    asked, held = json.loads(settings), np.load(data)
    samples = [{name: held[name][i : i + 1] for name in held} for i in range(len(held["t"]))]
    model = ov.Core().read_model(graph)
    # A convolution with a bias is two nodes there, of names that begin with its own.
    products = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in ("Convolution", "MatMul")]
    keep = [name for name in products if name.partition("/")[0] in asked["keep"]]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset(asked["preset"]),
        model_type=nncf.ModelType.TRANSFORMER if asked["model_type"] == "transformer" else None,
        fast_bias_correction=asked["fast_bias_correction"],
        ignored_scope=nncf.IgnoredScope(names=keep),
        subset_size=len(samples),
    )
    ov.save_model(quantized, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
