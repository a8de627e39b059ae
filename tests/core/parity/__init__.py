"""Tests of parity, with fake engines."""
