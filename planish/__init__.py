"""planish: a compiler that optimizes PyTorch models and checks every step."""

__version__ = "0.1.0"
