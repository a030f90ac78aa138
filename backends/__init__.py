"""Targets, their legalization, and the emission, execution and reading back of artifacts."""

if __name__ != "planish.backends":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.backends', not as {__name__!r}")
