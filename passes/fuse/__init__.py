"""Passes that turn several operators into the one they amount to."""

if __name__ != "planish.passes.fuse":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.fuse', not as {__name__!r}")
