"""AccuQuant: a diffusion checkpoint in, a low-bit sampling engine out.

`accuquant.runtime` samples from a bundle and needs no torch. `accuquant.calibrate` learns quantization parameters and
`accuquant.export` writes bundles; both are imported only when asked for, as are `load_unet` and `load_transformer`,
which put a bundle's network into a diffusers pipeline.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["AccuQuantError", "Bundle", "Pipeline", "SamplingPlan", "__version__", "load_transformer", "load_unet"]

if TYPE_CHECKING:
    from .export.diffusers_model import load_transformer, load_unet
    from .runtime import AccuQuantError, Bundle, Pipeline, SamplingPlan


def __getattr__(name: str) -> Any:
    if name in ("load_unet", "load_transformer"):
        from .export import diffusers_model

        return getattr(diffusers_model, name)
    if name in __all__:
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'accuquant' has no attribute {name!r}")
