"""Diffoundry compiles diffusion pipelines into checked, shippable engines."""

__version__ = "0.1.0"
