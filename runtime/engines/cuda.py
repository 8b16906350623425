"""The few calls of the CUDA runtime that an engine needs, each of them checked; through NVIDIA's `cuda-bindings`."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import AccuQuantError


class Cuda:
    """The first GPU of this machine. Addresses are plain integers, sizes bytes.

    Raises:
        AccuQuantError: from every call that CUDA refuses, with its own words.
    """

    def __init__(self) -> None:
        self._cuda: Any = importlib.import_module("cuda.bindings.runtime")

    def name(self) -> str:
        """As people know it, with its compute capability: NVIDIA L4 (sm89)."""
        facts = self._done(self._cuda.cudaGetDeviceProperties(0))
        return f"{facts.name.decode()} (sm{facts.major}{facts.minor})"

    def allocate(self, size: int) -> int:
        return int(self._done(self._cuda.cudaMalloc(size)))

    def free(self, address: int) -> None:
        self._done(self._cuda.cudaFree(address))

    def stream(self) -> Any:
        return self._done(self._cuda.cudaStreamCreate())

    def free_stream(self, stream: Any) -> None:
        self._done(self._cuda.cudaStreamDestroy(stream))

    def to_device(self, address: int, host: np.ndarray, stream: Any) -> None:
        """Begin to copy a contiguous array; it must stay as it is until the stream was waited for."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._done(self._cuda.cudaMemcpyAsync(address, host.ctypes.data, host.nbytes, kind, stream))

    def to_host(self, host: np.ndarray, address: int, stream: Any) -> None:
        """Begin to fill a contiguous array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._done(self._cuda.cudaMemcpyAsync(host.ctypes.data, address, host.nbytes, kind, stream))

    def wait(self, stream: Any) -> None:
        self._done(self._cuda.cudaStreamSynchronize(stream))

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """What `work` puts on the stream, as a graph that `launch` runs with one call; nothing is run now."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._done(self._cuda.cudaStreamBeginCapture(stream, mode))
        try:
            work()
        finally:
            graph = self._done(self._cuda.cudaStreamEndCapture(stream))
        made = self._done(self._cuda.cudaGraphInstantiate(graph, 0))
        self._done(self._cuda.cudaGraphDestroy(graph))
        return made

    def launch(self, graph: Any, stream: Any) -> None:
        self._done(self._cuda.cudaGraphLaunch(graph, stream))

    def free_graph(self, graph: Any) -> None:
        self._done(self._cuda.cudaGraphExecDestroy(graph))

    def _done(self, answer: tuple[Any, ...]) -> Any:
        error, *values = answer
        if int(error):
            _, said = self._cuda.cudaGetErrorString(error)
            raise AccuQuantError(f"CUDA: {said.decode()} ({int(error)})")
        return values[0] if values else None


def gpu() -> str | None:
    """The name of this machine's first GPU; None if it has none that CUDA can use, or `cuda-bindings` is missing."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return None
    try:
        return Cuda().name()
    except (AccuQuantError, ImportError):
        return None
