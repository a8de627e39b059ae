"""Runs a plan: workers, store, publication, resume."""
