"""Sparsification measured: real models, a language model, the cost, and nets trained here.

python -m planish.tools.bench.sparsity           every method on pretrained models
python -m planish.tools.bench.sparsity.smollm2   perplexity, time and memory
python -m planish.tools.bench.sparsity.cost      time and memory against the width of a layer
python -m planish.tools.bench.sparsity.trained   one-shot and iterative pruning of small nets
"""
