"""Proof that an engine still computes what the PyTorch original computes. Torch-free."""
