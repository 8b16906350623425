"""The runtime: bundles, engines and the sampling loop. Needs numpy and an engine; never torch."""

from .bundle import Bundle
from .errors import AccuQuantError
from .pipeline import Pipeline
from .plan import SamplingPlan

__all__ = ["AccuQuantError", "Bundle", "Pipeline", "SamplingPlan"]
