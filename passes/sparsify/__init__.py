"""Passes that set weights to zero, in patterns or at will, and repair what stays."""

if __name__ != "planish.passes.sparsify":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.sparsify', not as {__name__!r}")
