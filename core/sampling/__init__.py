"""Sampling from step tables: one sampler for every scheduler, noise, guidance."""
