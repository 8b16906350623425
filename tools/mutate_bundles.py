"""A handmade bundle, and bundles mutated from it: manifest, plan or graphs changed by what knows their formats.

Other types, huge numbers, NaN, names that lead elsewhere, deep nesting, exchanged and missing parts, external data, and
damaged bytes. Mostly the manifest has the digest of what was changed, as a forger would write it.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from accuquant.runtime.bundle import Manifest, describe, describe_rest, save_manifest
from accuquant.runtime.files import sha256
from accuquant.runtime.plan import PlanStep, SamplingPlan
from accuquant.runtime.rows import Rows, save_rows
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

CHANGED = {"manifest": ("manifest.json",), "plan": ("plan.json",), "graph": ("denoiser.onnx", "twin.onnx")}
NUMBERS = (0, -1, 1, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308, 1e200)
RAW = ("NaN", "Infinity", "1e999", "9" * 5000, "[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000)
NAMES = (
    "../plan.json", "/etc/passwd", "report/../../x", ".", "", "a\0b", "\x1b[2J", "[/b]", "x" * 5000, "C:\\x", "report",
    "denoiser.onnx", "twin.onnx.data", "plan.json", "\u202e", "0" * 64, "\ud800", "any", "class", "rows", "text",
)  # fmt: skip
OPERATORS = ("Loop", "If", "Reshape", "Resize", "Constant", "MatMul", "Pad", "Tile", "Nothing", "ConvTranspose")


def graph(quantized: bool) -> onnx.ModelProto:
    """x (N, 1, 4, 4) and t (N,) through one convolution, in integers or not."""
    source, nodes = "x", []
    weight = np.random.default_rng(0).normal(size=(1, 1, 3, 3)).astype(np.float32)
    held = {"weight": weight, "scale": np.float32(0.02), "zero": np.uint8(128), "ends": np.array([-1, 1, 1, 1])}
    if quantized:
        nodes += [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]
        nodes += [helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"])]
        source = "d"
    nodes += [helper.make_node("Conv", [source, "weight"], ["y"], pads=[1, 1, 1, 1])]
    nodes += [helper.make_node("Reshape", ["t", "ends"], ["time"]), helper.make_node("Add", ["y", "time"], ["out"])]
    x, t = (helper.make_tensor_value_info(n, 1, s) for n, s in (("x", ["N", 1, 4, 4]), ("t", ["N"])))
    out = helper.make_tensor_value_info("out", 1, ["N", 1, 4, 4])
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    opsets = [helper.make_opsetid("", 19)]
    return helper.make_model(helper.make_graph(nodes, "seed", [x, t], [out], held), opset_imports=opsets, ir_version=9)


def seed_bundle(folder: Path, steps: int = 3) -> list[dict[str, Any]]:
    """Write the bundle and return its manifest in every form of conditioning; that of none is the one written."""
    folder.mkdir(exist_ok=True)
    for name in CHANGED["graph"]:
        (folder / name).write_bytes(graph(name == "denoiser.onnx").SerializeToString())
    (folder / "text_encoder.onnx").write_bytes(graph(False).SerializeToString())
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    save_rows(folder / "conditions.safetensors", Rows({"context": np.ones((2, 3), np.float32)}, {}))
    rows = [
        PlanStep(timestep=steps - i, a=0.5, b=dict.fromkeys((i, max(i - 1, 0)), 0.02), c={i: 0.1}) for i in range(steps)
    ]
    plan = SamplingPlan(sampler="heun", prediction_type="epsilon", init_sigma=1.0, steps=tuple(rows))
    plan.save(folder / "plan.json")
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "index.html").write_text("<p>report")
    networks = describe(folder, {"denoiser": "denoiser.onnx", "twin": "twin.onnx"})
    encoder = describe(folder, {"text_encoder": "text_encoder.onnx"})
    operators = {"conv": {"kind": "conv", "role": "body", "weight_bits": 4, "weight_container": "int4",
                          "inputs": ["uint8"], "parameters": 9, "stored_bytes": 5}}  # fmt: skip
    common = {
        "family": "seed", "found": "a seed of 4x4", "sample_shape": (1, 4, 4), "scheme": "W4A8", "target": "cpu",
        "policy": "standard", "sampler": "heun", "operators": operators, "provenance": {"seed": [1, {"a": None}]},
        "quality": {"psnr": 30.5},
    }  # fmt: skip
    manifests = []
    for known in (
        None,
        {"kind": "class", "classes": 4, "null": 4, "guidance": 2.0},
        {"kind": "rows", "shapes": {"context": (3,)}},
        {"kind": "text", "inputs": ("context",), "examples": ("a cat",)},
    ):
        held = networks | (encoder if known and known["kind"] == "text" else {})
        files = describe_rest(folder, held)
        manifest = Manifest(**common, networks=held, files=files, conditioning=known)  # type: ignore[arg-type]
        manifests.append(json.loads(manifest.model_dump_json()))
    save_manifest(folder, Manifest(**manifests[0]))
    return manifests


def noise(data: bytes, source: random.Random) -> bytes:
    """Bits flipped, bytes put in or left out, the end cut off."""
    damaged = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 8))):
        at = source.randrange(len(damaged) + 1)
        match source.randrange(4):
            case 0 if at < len(damaged):
                damaged[at] ^= 1 << source.randrange(8)
            case 1:
                damaged[at:at] = source.randbytes(source.choice((1, 8, 64)))
            case 2:
                del damaged[at : at + source.choice((1, 8, 256))]
            case 3 if source.random() < 0.3:
                del damaged[at:]
    return bytes(damaged)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in there."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def changed_json(original: Any, source: random.Random) -> bytes:
    """The text of a JSON value some parts of which were replaced, renamed, dropped, doubled or nested."""
    if source.random() < 0.1:
        return noise(json.dumps(original).encode(), source)
    value, raw = copy.deepcopy(original), ""
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        found = places(value)
        if not found:
            break
        container, key = source.choice(found)
        elsewhere = (lambda held, name: held[name])(*source.choice(found))
        match source.randrange(8):
            case 0 | 1:
                container[key] = source.choice((*NUMBERS, True, None, [], {}, [[]], {"a": 1}))
            case 2:
                container[key] = source.choice(NAMES)
            case 3:
                del container[key]
            case 4 if isinstance(container, dict):
                new = source.choice((*NAMES, *map(str, NUMBERS)))
                container[new] = container.pop(key)
            case 5:
                container[key] = copy.deepcopy(elsewhere)
            case 6:
                container[key], raw = "@raw@", source.choice(RAW)
            case 7:
                container[key] = [container[key]] * source.choice((1, 2, 30))
    return json.dumps(value).replace('"@raw@"', raw).encode()


def changed_graph(original: bytes, source: random.Random) -> bytes:
    """A graph with other shapes, types, operators, inputs, attributes, external data - or damaged bytes."""
    if source.random() < 0.2:
        return noise(original, source)
    model = onnx.load_from_string(original)
    for _ in range(source.choice((1, 1, 2, 3))):
        node, tensor = source.choice(model.graph.node), source.choice(model.graph.initializer)
        big = source.choice((0, -1, 1, 7, 2**31, 2**40, 2**62))
        match source.randrange(9):
            case 0:
                tensor.dims[:] = [source.choice((big, 1, 3)) for _ in range(source.randrange(6))]
            case 1:
                tensor.data_type = source.randrange(30)
            case 2:
                tensor.raw_data = noise(tensor.raw_data, source)
            case 3:
                tensor.data_location = TensorProto.EXTERNAL
                where = source.choice(NAMES).encode("utf-8", "replace").decode()
                for key, text in (("location", where), ("offset", str(big)), ("length", str(source.choice((4, big))))):
                    tensor.external_data.add(key=key, value=text)
            case 4:
                node.op_type = source.choice(OPERATORS)
            case 5:
                node.input[:] = source.sample(("x", "t", "y", "out", "d", "", "weight"), source.randrange(4))
            case 6:
                name = source.choice(("pads", "strides", "dilations", "group", "axis", "kernel_shape"))
                node.attribute.append(helper.make_attribute(name, [big] * source.choice((1, 2, 4))))
            case 7:
                shape = source.choice((model.graph.input, model.graph.output))[0].type.tensor_type.shape
                source.choice(shape.dim).dim_value = big
            case 8:
                model.opset_import[0].version = source.choice((1, 7, 13, 21, 99, big))
    return model.SerializeToString()


class Mutations:
    """Writes mutated bundles into `folder`, one over the other."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder, self.manifests = kind, folder, seed_bundle(folder)
        self._originals = {name: (folder / name).read_bytes() for name in CHANGED[kind]}

    def seeds(self) -> list[bytes]:
        """What is changed, unchanged."""
        if self.kind == "manifest":
            return [json.dumps(manifest).encode() for manifest in self.manifests]
        return list(self._originals.values())

    def changed(self, data: bytes, source: random.Random) -> bytes:
        try:
            return changed_graph(data, source) if self.kind == "graph" else changed_json(json.loads(data), source)
        # Of a mutation's mutation, which need not be JSON or a graph any more, or have nothing left to change.
        except (ValueError, RecursionError, IndexError, DecodeError):
            return noise(data, source)

    def write(self, source: random.Random) -> None:
        """A bundle, new by one mutation; one in ten does not have its digest."""
        for name, whole in self._originals.items():
            (self.folder / name).write_bytes(whole)
        data = self.changed(source.choice(self.seeds()), source)
        self.put(source.choice(CHANGED[self.kind]), data, vouched=source.random() < 0.9)

    def put(self, name: str, data: bytes, vouched: bool) -> None:
        """Write a file and, if it is not the manifest, the manifest: with the file's digest, or with that it had."""
        (self.folder / name).write_bytes(data)
        if name == "manifest.json":
            return
        manifest = copy.deepcopy(self.manifests[0])
        held = manifest["files"] if name in manifest["files"] else manifest["networks"][Path(name).stem]["files"]
        held[name] = sha256(self.folder / name) if vouched else held[name]
        (self.folder / "manifest.json").write_text(json.dumps(manifest))
