"""Benchmarks: pretrained models, the architecture sweep, and the figures in the README."""
