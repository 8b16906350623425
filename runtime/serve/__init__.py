"""Bundles in serving stacks; each module holds the same Pipeline. Never torch."""
