"""`accuquant-serve http BUNDLE...` and `accuquant-serve triton BUNDLE`: serving stacks, a subcommand for each."""

from .console import commands
from .serve.cli_http import http
from .serve.cli_triton import triton

main = commands({"http": http, "triton": triton}, "Serve bundles.")
