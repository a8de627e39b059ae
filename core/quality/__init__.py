"""Metrics of pictures that need someone else's trained weights: always local files, never fetched.

Everything here works on pictures as uint8 arrays [height, width, 3] (RGB).
"""
