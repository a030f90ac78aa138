"""The ``README.txt`` of a bundle: how to replay it, and what each file is."""

from __future__ import annotations

import shlex
from pathlib import Path

from planish.passes.debug.bundle_facts import Facts

_FILES = {
    "program.pt2": "the program right before it failed, with its weights and sample inputs",
    "recipe.yaml": "the passes from there on, with target, seed and choices",
    "probe.zip": "the second inputs that programs were compared at (JSON and safetensors)",
    "calibration.zip": "the calibration inputs (JSON and safetensors)",
    "repro.json": "the failure, the settings of the run, versions, what is missing here",
    "error.txt": "the error as Python shows it",
}
_WHAT = {
    "pass": "The first pass of recipe.yaml fails on program.pt2.",
    "recipe": "program.pt2 is the original program, and recipe.yaml as a whole fails on it.",
    "export": "program.pt2 is an optimized program that could not be written as an artifact.",
}


def readme(folder: Path, final: Path, facts: Facts) -> str:
    """The text.

    Args:
        folder: where the files are.
        final: where the bundle will be.
        facts: what it says.
    """
    present = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    lines = [
        "A failure of planish, with all it takes to make it happen again.",
        "",
        f"    planish repro {shlex.quote(final.name)}",
        "",
        "run where this folder is, replays it, and says whether the same failure shows.",
        _WHAT[facts.stage],
        "",
        *(f"    {line}" for line in facts.failure.message.splitlines()),
        "",
        "Files:",
        *(
            f"    {name:<18}{_size(present[name]):>10}  {text}"
            for name, text in _FILES.items()
            if name in present
        ),
        "",
        f"Together {_size(sum(present.values()))}; most of it is the model's weights. Do not pass",
        "this folder on where the weights or the inputs are secret.",
        "",
        "Nothing here is pickled. Reading the files runs no code of theirs; replaying imports the",
        "passes that recipe.yaml names as module:Class, which is code of whoever wrote them.",
    ]
    if facts.left_out:
        lines += ["", "What could not be bundled:", *(f"    {s}" for s in facts.left_out)]
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
