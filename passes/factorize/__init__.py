"""Passes that write one product as two thin ones, through a space of lower rank."""

if __name__ != "planish.passes.factorize":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.factorize', not as {__name__!r}")
