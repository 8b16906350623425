"""Plans for NVIDIA GPUs: compiled ahead of time by TensorRT-RTX, kept in the engine cache with what their log told."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .engine_cache import CachedEngine, EngineCache, EngineKey
from .engines.base import Kernel
from .engines.rtx_compile import PACKAGES, CompileRequest, compile_plan, installed
from .engines.rtx_log import Compiled
from .errors import AccuQuantError


@dataclass(frozen=True)
class CachedPlan:
    engine: CachedEngine
    compiled: Compiled


def cached_plan(
    bundle: Bundle, request: CompileRequest, cache: EngineCache, on_wait: Callable[[], None] = lambda: None
) -> CachedPlan:
    """The plan of a bundle's denoiser for `request`, compiled only if the cache has none.

    Raises:
        AccuQuantError: as `compile_plan`, and as `EngineCache.get`.
    """

    def build(path: Path) -> dict[str, Any]:
        return asdict(compile_plan(request, path))

    found = cache.get(_key(bundle, request), build, on_wait)
    kernels = tuple(Kernel(**kernel | {"nodes": tuple(kernel["nodes"])}) for kernel in found.facts["kernels"])
    return CachedPlan(found, Compiled(kernels, found.facts["weights_bytes"], found.facts["activation_bytes"]))


def _key(bundle: Bundle, request: CompileRequest) -> EngineKey:
    if not installed():
        raise AccuQuantError("TensorRT-RTX is not installed; install it with: pip install 'accuquant[rtx]'")
    version = next(v for v in map(_version, PACKAGES) if v)
    batches = f"batch {request.batches[0]} to {request.batches[2]}, best {request.batches[1]}"
    return EngineKey(bundle.digest("denoiser"), f"TensorRT-RTX {version}", request.target, batches)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
