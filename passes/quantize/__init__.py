"""Passes that write values as small integers, and what decides where."""

if __name__ != "planish.passes.quantize":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.quantize', not as {__name__!r}")
