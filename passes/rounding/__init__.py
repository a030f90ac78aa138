"""Passes that choose the integers of weights: by the output they give, not one by one."""

if __name__ != "planish.passes.rounding":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.rounding', not as {__name__!r}")
