"""The command line, one file per command, and the benchmarks."""

if __name__ != "planish.tools":
    # A second copy under another name would hold other classes, and isinstance would fail.
    raise ImportError(f"import this package as 'planish.tools', not as {__name__!r}")
