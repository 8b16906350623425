"""`accuquant-serve http BUNDLE...`, `ray BUNDLE...` and `triton BUNDLE`: serving stacks, a subcommand for each."""

from .console import commands
from .serve.cli_http import http
from .serve.cli_ray import ray
from .serve.cli_triton import triton

main = commands({"http": http, "ray": ray, "triton": triton}, "Serve bundles.")
