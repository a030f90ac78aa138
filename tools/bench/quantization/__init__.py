"""Measured speed, fidelity and cost of quantized files, beside those of other tools."""

if __name__ != "planish.tools.bench.quantization":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(
        f"import this package as 'planish.tools.bench.quantization', not as {__name__!r}"
    )
