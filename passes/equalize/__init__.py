"""Exact passes that move ranges between operators, so that integers fit them better."""

if __name__ != "planish.passes.equalize":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.equalize', not as {__name__!r}")
