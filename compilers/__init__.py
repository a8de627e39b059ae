"""Stages that trace, rewrite and lower models."""
