"""The registered recipes: a literal table, name -> items in the grammar of ``passes.spec``.

Each but ``none`` contains the passes of ``exact``.

The order of ``exact``: cleanup, so that the patterns of the others meet plain graphs; then
composite operators are recovered, before their parts could be folded into something else; then what
is left is folded into weights, padding and batch norms first, since they stand between the others;
then cleanup of what that left behind. ``fuse-parallel-linears`` is left out: in ONNX Runtime on
CPU, one wide product and a split measured no faster than the products themselves (MiniLM, 16 and
128 tokens).

``int8-static`` repairs before and after rounding: scales of channels go from values with outliers
into weights, where that is worth a multiplication, and the mean error of each output goes into its
bias. On MiniLM the three together
keep a cosine of 0.998 where plain ranges keep 0.994; on EfficientNet-Lite0 the biases alone are
worth 5 dB. ``int4-weight`` rounds by GPTQ with calibration, by HQQ without, and keeps the layers
that would suffer most in 8 bits.

``int8`` is chosen by measurement (``planish.fastest``): its own passes are those of ``exact``, and
an alternative takes their place only where its file is faster here and its outputs keep 12 dB on
inputs that it was not calibrated with. Below that, decisions flip.
"""

from __future__ import annotations

from collections.abc import Mapping

_CLEANUP = (
    "fold-constants",
    "fold-ranges",
    "remove-identities",
    "simplify-layout",
    "eliminate-common-subexpressions",
    "eliminate-dead-code",
)

# What int8 asks of its alternatives where the caller asks for nothing.
FLOOR = "keep-float{min_sqnr_db=12}"

RECIPES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "exact": (
        "merge-duplicate-constants",
        *_CLEANUP,
        "recover-norms",
        "recover-activations",
        "recover-rotary",
        "recover-attention",
        "fold-padding",
        "fold-batch-norm",
        "fold-scale-shift",
        "fold-scalar",
        "merge-linears",
        *_CLEANUP,
        "merge-duplicate-constants",
    ),
    "fp16": ("exact", "cast-half{dtype=fp16}"),
    "bf16": ("exact", "cast-half{dtype=bf16}"),
    "int8-static": (
        "exact",
        "smooth-quant{min_gain_db=6}",
        "quantize{range=minmax}",
        "correct-bias",
    ),
    "int8-dynamic": ("exact", "quantize{mode=dynamic}"),
    "int8-weight": ("exact", "quantize{mode=weight}"),
    "int4-weight": (
        "exact",
        "choose-bits",
        "fuse-parallel-linears",
        "gptq{without_data=hqq}",
    ),
    "int8": (
        f'alternatives={{int8-static="int8-static,{FLOOR}",int8-dynamic="int8-dynamic,{FLOOR}"}}',
        "exact",
    ),
}
