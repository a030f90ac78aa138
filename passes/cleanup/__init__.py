"""Passes that remove what computes nothing new: constants, duplicates, dead code, identities."""

if __name__ != "planish.passes.cleanup":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.cleanup', not as {__name__!r}")
