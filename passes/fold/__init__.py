"""Passes that move arithmetic into weights and operator options, where it costs nothing."""

if __name__ != "planish.passes.fold":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.fold', not as {__name__!r}")
