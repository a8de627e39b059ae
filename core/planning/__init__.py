"""Turns a profile and a model into a graph of stages, and gives every stage its key."""
