"""Benchmarks: real pretrained models, the architecture sweep, and the figures that the README quotes."""
