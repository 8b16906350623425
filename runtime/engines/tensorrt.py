"""TensorRT and TensorRT-RTX on an NVIDIA GPU: one adapter, and what differs between them as a record.

A plan is compiled for the batch that was asked and kept in the engine cache. Every input and output has one buffer on
the GPU for as long as the engine lives, so that a step is the same work on the same addresses every time: it is
captured into a CUDA graph, by TensorRT-RTX itself or here, and launched with one call.

Tested with a stand-in for the GPU that calls nothing the real libraries do not have; not run on one.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..engine_cache import EngineCache
from ..errors import AccuQuantError
from ..files import cache_folder, write_bytes
from .base import Engine, EngineOptions, Kernel, Port
from .compile_plan import TARGETS, CompileRequest, version
from .cuda import Cuda
from .plans import cached_plan, plan_key
from .rtx_log import Compiled

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class Flavour:
    """What a library of the family does itself, and its sibling leaves to us.

    `ahead` plans name the GPUs they are for and finish their kernels on the first run, which a runtime cache keeps;
    the others are measured and finished while they are built, which a timing cache makes shorter.
    """

    module: str
    ahead: bool
    captures: bool


RTX = Flavour("tensorrt_rtx", ahead=True, captures=True)
PLAIN = Flavour("tensorrt", ahead=False, captures=False)


class TensorRTEngine(Engine):
    """A graph compiled by TensorRT 10.13 or later."""

    flavour: ClassVar[Flavour] = PLAIN

    def __init__(self, path: Path, options: EngineOptions) -> None:
        super().__init__(path, options)
        self._library: Any = importlib.import_module(self.flavour.module)
        self._cuda = Cuda()
        device = self._cuda.name()
        self.name = f"{version(self.flavour.module)} on {device}"
        plan, self._compiled = self._plan(device)
        self._log = _log_of(self._library)
        self._runtime: trt.Runtime = self._library.Runtime(self._log)
        self._engine: trt.ICudaEngine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise AccuQuantError(f"{plan} cannot be loaded by {self.name}: {self._log.said()}")
        self._just_in_time = cache_folder() / "engines" / f"{plan.parent.name}.jit"
        self._jit_cache: Any = None
        self._graph: Any = None
        self._warm = False
        with ExitStack() as held:
            self._context: trt.IExecutionContext = self._open_context()
            if self._jit_cache is not None:
                held.callback(self._keep_kernels)
            self.inputs = tuple(self._ports(self._library.TensorIOMode.INPUT))
            for port in self.inputs:
                self._context.set_input_shape(port.name, port.shape)
            self.outputs = tuple(self._ports(self._library.TensorIOMode.OUTPUT))
            self._stream = self._cuda.stream()
            held.callback(self._cuda.free_stream, self._stream)
            self._addresses, self._hosts = {}, {}
            for port in (*self.inputs, *self.outputs):
                host = self._hosts[port.name] = np.zeros(port.shape, port.dtype)
                address = self._addresses[port.name] = self._cuda.allocate(host.nbytes)
                held.callback(self._cuda.free, address)
                self._context.set_tensor_address(port.name, address)
            held.callback(self._cuda.wait, self._stream)
            self._held = held.pop_all()

    def _plan(self, device: str) -> tuple[Path, Compiled]:
        """The plan for this GPU and batch, from the cache or built into it."""
        cache, batch = EngineCache(cache_folder()), self.options.batch
        target = f"sm{device.rpartition('(sm')[2].rstrip(')')}"
        target = (target if target in TARGETS else "default") if self.flavour.ahead else device
        timings = None if self.flavour.ahead else cache.folder / "timings.cache"
        request = CompileRequest(self.path, target, (batch, batch, batch), self.flavour.module, timings)
        made_before = replace(request, batches=CompileRequest.batches)  # by accuquant-build, say
        least, _, most = made_before.batches
        if least <= batch <= most and cache.holds(plan_key(made_before)):
            request = made_before
        found = cached_plan(request, cache)
        return found.engine.path, found.compiled

    def _open_context(self) -> "trt.IExecutionContext":
        if not self.flavour.captures:
            context = self._engine.create_execution_context()
        else:
            config: Any = self._engine.create_runtime_config()  # TensorRT's has none of the following
            config.cuda_graph_strategy = self._library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._jit_cache = config.create_runtime_cache()
            if self._just_in_time.exists():  # it checks by itself whether it was made here
                self._jit_cache.deserialize(self._just_in_time.read_bytes())
            config.set_runtime_cache(self._jit_cache)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise AccuQuantError(f"{self.name} has no room for {self.path.name}: {self._log.said()}")
        return context

    def _ports(self, mode: Any) -> Iterator[Port]:
        """The inputs; or, once their shapes are set, the outputs, of which any axis may depend on the batch."""
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            if self._engine.get_tensor_mode(name) != mode:
                continue
            if mode == self._library.TensorIOMode.INPUT:
                sides = self._engine.get_tensor_shape(name)
                shape = tuple(self.options.batch if side == -1 else side for side in sides)
            else:
                shape = tuple(self._context.get_tensor_shape(name))
            yield Port(name, np.dtype(self._library.nptype(self._engine.get_tensor_dtype(name))), shape)

    def _infer(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for name, value in inputs.items():
            np.copyto(self._hosts[name], value)
            self._cuda.to_device(self._addresses[name], self._hosts[name], self._stream)
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue()
        for port in self.outputs:
            self._cuda.to_host(self._hosts[port.name], self._addresses[port.name], self._stream)
        self._cuda.wait(self._stream)
        if self._graph is None and self._warm and not self.flavour.captures:
            # Captured on the second run: the first one allocates, which a capture must not.
            self._graph = self._cuda.capture(self._stream, self._enqueue)
            self._held.callback(self._cuda.free_graph, self._graph)
        self._warm = True
        return [self._hosts[port.name] for port in self.outputs]

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise AccuQuantError(f"{self.name} did not run {self.path.name}: {self._log.said()}")

    def kernels(self) -> list[Kernel]:
        return list(self._compiled.kernels)

    def close(self) -> None:
        self._held.close()
        for owner in ("_context", "_jit_cache", "_engine", "_runtime"):  # each must outlive what it made
            self.__dict__.pop(owner, None)

    def _keep_kernels(self) -> None:
        """What was compiled on the first run, for the next process."""
        write_bytes(self._just_in_time, bytes(self._jit_cache.serialize()))


class TensorRTRTXEngine(TensorRTEngine):
    """A graph compiled by TensorRT-RTX 1.7."""

    flavour = RTX


def _log_of(library: Any) -> Any:
    """A logger that keeps warnings and errors instead of printing them."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self._lines.append(message)

        def said(self) -> str:
            return "; ".join(dict.fromkeys(self._lines)) or "no reason given"

    return Log()
