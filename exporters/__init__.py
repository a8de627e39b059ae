"""Stages that write portable model files."""
