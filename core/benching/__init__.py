"""Measures a bundle's engines beside PyTorch: seconds, memory, energy, and what they draw."""
