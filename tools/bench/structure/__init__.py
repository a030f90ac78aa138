"""Low-rank factors and structured pruning measured."""
