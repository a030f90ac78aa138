"""What values a program takes: statistics of fixed size from one sweep over the samples."""

if __name__ != "planish.passes.observe":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.observe', not as {__name__!r}")
