"""A part of a graph, cut out and run as the ONNX standard defines it: ONNX Runtime with nothing optimised."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime


class Part:
    """What leads from `inputs` to `outputs`, with the constants it reads; `needs` are the graph's own inputs it meets.

    An input's first axis is free; the rest is as in the graph.
    """

    def __init__(self, model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        self.nodes = _between(model, set(inputs), outputs)
        read = {value for node in self.nodes for value in node.inputs if value is not None}
        self.constants = [value for value in read if value.is_initializer()]
        self.needs = [value for value in model.graph.inputs if value in read]
        given = {str(value.name): value for value in (*inputs, *self.needs)}
        graph = onnx.helper.make_graph(
            [ir.to_proto(node) for node in self.nodes],
            "part",
            [onnx.helper.make_tensor_value_info(name, _dtype(value), _shape(value)) for name, value in given.items()],
            [onnx.ValueInfoProto(name=value.name) for value in outputs],
            [_initializer(value) for value in self.constants],
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])

    def run(self, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs for inputs by name."""
        return [np.asarray(array) for array in self._session.run(None, dict(given))]

    @property
    def weights(self) -> int:
        """Numbers in its constants."""
        return sum(value.const_value.size for value in self.constants if value.const_value is not None)


def _between(model: ir.Model, inputs: Collection[ir.Value], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """All nodes that have a part in `outputs`, not looking behind `inputs`, in the graph's order."""
    found = set[ir.Node]()
    left = [value.producer() for value in outputs if value not in inputs]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [value.producer() for value in node.inputs if value is not None and value not in inputs]
    return [node for node in model.graph if node in found]


def _dtype(value: ir.Value) -> int:
    return int(value.dtype) if value.dtype is not None else onnx.TensorProto.FLOAT


def _shape(value: ir.Value) -> list[int | None] | None:
    if value.shape is None:
        return None
    return [None if n == 0 or not isinstance(side, int) else side for n, side in enumerate(value.shape)]


def _initializer(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None
    made = ir.to_proto(value.const_value)
    made.name = value.name
    return made
