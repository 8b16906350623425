"""A GPU that is none: CUDA on host memory, and TensorRT's classes whose contexts run the ONNX graph of a plan.

Classes hold only what the adapter uses, under the names of the real ones; a test holds the names against the real ones.
"""

import ctypes
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine


class Cuda:
    """`cuda.bindings.runtime`: every call answers (error, values...)."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self):
        self.memory, self.streams, self.graphs = {}, set(), []
        self.capturing, self.launched, self.room = None, 0, 99

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        return 0, SimpleNamespace(name=b"Stand-in", major=8, minor=9)

    def cudaGetErrorString(self, error):  # noqa: N802
        return 0, b"out of memory"

    def cudaMalloc(self, size):  # noqa: N802
        if len(self.memory) >= self.room:
            return 2, None
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cudaFree(self, address):  # noqa: N802
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, to, of, size, kind, stream):  # noqa: N802
        assert stream in self.streams
        assert self.capturing is None
        device = to if kind == 1 else of
        assert size <= len(self.memory[device])
        ctypes.memmove(to, of, size)
        return (0,)

    def cudaStreamCreate(self):  # noqa: N802
        stream = max(self.streams, default=76) + 1
        self.streams.add(stream)
        return 0, stream

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.streams.remove(stream)
        return (0,)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        graph, self.capturing = self.capturing, None
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        self.graphs.append(list(graph))
        return 0, self.graphs[-1]

    def cudaGraphDestroy(self, graph):  # noqa: N802
        return (0,)

    def cudaGraphExecDestroy(self, graph):  # noqa: N802
        self.graphs.remove(graph)
        return (0,)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        self.launched += 1
        for work in graph:
            work()
        return (0,)


class ILogger:
    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)


class Runtime:
    # What stands in: the graph that every plan is of, the GPU, and what happened.
    graph: ClassVar[Path]
    graphs: ClassVar[dict[bytes, Path]] = {}  # of plans that are of another graph
    gpu: ClassVar[Cuda]
    log: ClassVar[list[str]]

    def __init__(self, log):
        self.logger = log

    def deserialize_cuda_engine(self, plan):
        return ICudaEngine(Runtime.graphs.get(bytes(plan), Runtime.graph))


class ICudaEngine:
    def __init__(self, graph):
        self._graph = graph
        self._ports = OnnxRuntimeEngine(graph, EngineOptions(batch=1))

    @property
    def num_io_tensors(self):
        return len(self._ports.inputs) + len(self._ports.outputs)

    def _port(self, name):
        return next(p for p in (*self._ports.inputs, *self._ports.outputs) if p.name == name)

    def get_tensor_name(self, index):
        return [p.name for p in (*self._ports.inputs, *self._ports.outputs)][index]

    def get_tensor_shape(self, name):
        return (-1, *self._port(name).shape[1:])

    def get_tensor_dtype(self, name):
        return self._port(name).dtype

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in ("x", "t") else TensorIOMode.OUTPUT

    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, config=None):
        Runtime.log.append(f"context with {getattr(config, 'cuda_graph_strategy', None)}")
        return IExecutionContext(self._graph)


class IRuntimeConfig:
    cuda_graph_strategy = None

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        Runtime.log.append("runtime cache set")
        return True


class IRuntimeCache:
    def deserialize(self, blob):
        Runtime.log.append(f"runtime cache read: {blob.decode()}")
        return True

    def serialize(self):
        return b"kernels"


class IExecutionContext:
    def __init__(self, graph):
        self._graph, self._engines = graph, {}
        self._shapes, self._addresses = {}, {}

    def set_input_shape(self, name, shape):
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        """Only the engine knows, as only TensorRT does: it is asked with zeros of the shapes that were set."""
        engine = self._of(self._shapes["x"][0])
        zeros = {p.name: np.zeros(self._shapes[p.name], p.dtype) for p in engine.inputs}
        return dict(zip([p.name for p in engine.outputs], engine.run_all(zeros), strict=True))[name].shape

    def execute_async_v3(self, stream):
        assert stream in Runtime.gpu.streams
        if Runtime.gpu.capturing is not None:
            Runtime.gpu.capturing.append(self._run)
        else:
            self._run()
        return True

    def _of(self, batch):
        if batch not in self._engines:
            options = EngineOptions(batch=batch, threads=1, target="tensorrt")
            self._engines[batch] = OnnxRuntimeEngine(self._graph, options)
        return self._engines[batch]

    def _run(self):
        engine = self._of(self._shapes["x"][0])
        given = {p.name: self._array(p, self._shapes[p.name]) for p in engine.inputs}
        for out, values in zip(engine.outputs, engine.run_all(given), strict=True):
            self._array(out, values.shape)[:] = values

    def _array(self, port, shape):
        block = Runtime.gpu.memory[self._addresses[port.name]]
        return block.view(port.dtype)[: int(np.prod(shape))].reshape(shape)


TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
nptype = np.dtype

LIBRARIES = ("tensorrt", "tensorrt_rtx")


def install(patch, graph):
    """Make this process believe in a GPU and both libraries, whose plans are of `graph`; returns the GPU."""
    cuda = Cuda()
    for name in LIBRARIES:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for given in ("ILogger", "Runtime", "TensorIOMode", "CudaGraphStrategy", "nptype"):
            setattr(module, given, globals()[given])
        patch.setitem(sys.modules, name, module)
    patch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    Runtime.graph, Runtime.gpu, Runtime.log = graph, cuda, []
    return cuda


# What of it the adapter may use, by class; RTX_ONLY is behind the flavour's record.
CLASSES = (Runtime, ICudaEngine, IExecutionContext)
RTX_ONLY = (IRuntimeConfig, IRuntimeCache)
