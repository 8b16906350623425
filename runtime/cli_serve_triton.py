"""`accuquant-serve-triton BUNDLE --out REPOSITORY`: a bundle as models that Triton Inference Server loads."""

from .console import command
from .serve.cli_triton import triton

main = command(triton)
