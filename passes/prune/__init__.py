"""Passes that remove whole heads, neurons and channels, with all that is coupled to them."""

if __name__ != "planish.passes.prune":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.prune', not as {__name__!r}")
