"""Stages that belong to no target: capture, step tables, checks."""
