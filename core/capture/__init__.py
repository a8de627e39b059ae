"""Recording what the PyTorch original computes: trajectories, swaps, shapes, floors."""
