"""Passes: the contract, the pipeline, recipes, instruments, and one file per pass."""

if __name__ != "planish.passes":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes', not as {__name__!r}")
