"""Stages that tests run through the real driver, store and worker code."""
