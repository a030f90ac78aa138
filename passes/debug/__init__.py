"""Find what is wrong: error per node, bisection, bundles that replay a failure, reduction."""
