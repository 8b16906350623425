"""Writes bundles: the float graph, its lowering to Q/DQ, verification, comparison and report."""
