"""`accuquant-serve http BUNDLE...`: bundles in serving stacks; one subcommand for each."""

from .console import commands
from .serve.cli_http import http

main = commands({"http": http}, "Serve bundles.")
