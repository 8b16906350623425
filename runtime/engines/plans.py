"""Plans for NVIDIA GPUs in the engine cache: compiled at most once, kept with what the compiler told of kernels."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..engine_cache import CachedEngine, EngineCache, EngineKey
from ..files import sha256
from .base import Kernel
from .compile_plan import CompileRequest, compile_plan, version
from .rtx_log import Compiled


@dataclass(frozen=True)
class CachedPlan:
    engine: CachedEngine
    compiled: Compiled


def cached_plan(request: CompileRequest, cache: EngineCache, on_wait: Callable[[], None] = lambda: None) -> CachedPlan:
    """The plan for `request`, compiled only if the cache has none.

    Raises:
        AccuQuantError: as `compile_plan`, and as `EngineCache.get`.
    """

    def build(path: Any) -> dict[str, Any]:
        return asdict(compile_plan(request, path))

    found = cache.get(plan_key(request), build, on_wait)
    kernels = tuple(Kernel(**kernel | {"nodes": tuple(kernel["nodes"])}) for kernel in found.facts["kernels"])
    return CachedPlan(found, Compiled(kernels, found.facts["weights_bytes"], found.facts["activation_bytes"]))


def plan_key(request: CompileRequest) -> EngineKey:
    """All that decides a plan: the graph with its weights, the compiler's version, the GPU and the batch sizes."""
    data = request.graph.with_name(request.graph.name + ".data")
    graph = "".join(sha256(path) for path in (request.graph, data) if path.exists())
    least, best, most = request.batches
    batches = f"batch {least}" if least == most else f"batch {least} to {most}, best {best}"
    return EngineKey(graph, version(request.library), request.target, batches)
