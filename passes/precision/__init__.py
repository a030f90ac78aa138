"""Passes that change the floating-point type: 16 bits with islands of 32."""

if __name__ != "planish.passes.precision":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.passes.precision', not as {__name__!r}")
