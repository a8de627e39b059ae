"""Rules that rewrite an ONNX graph into one that computes the same and is faster.

A rule is a module with a function `apply(graph) -> int` that edits the graph in place and
says how often it did. Its docstring draws the graph before and after. docs/fusions.md holds what
each one gains, and what was tried and gained nothing.
"""
