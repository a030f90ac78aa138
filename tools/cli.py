"""``planish``: the command line. Each command lives in a file of its own, loaded when it is run."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from planish.ir.errors import PlanishError

# command -> (module:attribute, one-line help shown by `planish --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "optimize": ("planish.tools.optimize:optimize", "Optimize a model and write the artifact."),
    "quantize": (
        "planish.tools.quantize:quantize",
        "Quantize a model; say how fast and how right the file is.",
    ),
    "export": ("planish.tools.export:export", "Export a model to a verified ONNX file."),
    "show": ("planish.tools.show:show", "Print a model as canonical text."),
    "passes": ("planish.tools.passes:passes", "List the passes, or explain one."),
    "run-pass": ("planish.tools.run_pass:run_pass", "Run passes on a model and show the diff."),
    "repro": ("planish.tools.repro:repro", "Replay the bundle of a failure."),
    "reduce": ("planish.tools.reduce:reduce", "Shrink the bundle of a failure."),
    "diff": ("planish.tools.diff:diff", "Show what is different between two programs."),
    "compare": ("planish.tools.compare:compare", "Compare the outputs of two models or files."),
    "bisect": ("planish.tools.bisect:bisect", "Find the rewrite that makes a result bad."),
    "report": ("planish.tools.report:report", "Write a report of a run as one HTML page."),
    "bench": ("planish.tools.bench_command:bench", "Time artifacts against each other."),
    "doctor": ("planish.tools.doctor:doctor", "Say what this machine and installation can do."),
}


class Lazy(click.Group):
    """A group whose commands are imported on use, so that ``--help`` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command where there is no such one."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 verification failed, 4 unsupported.",
)
@click.version_option(package_name="planish")
def cli() -> None:
    """Optimize PyTorch models, with every step checked.

    MODEL is package.module:callable, a .pt2 file, or a local Hugging Face folder.

    \b
    Examples:
      planish optimize ./minilm -o minilm.onnx
      planish export my_package.models:build -o model.onnx --opset 20
      planish run-pass model.pt2 fold-batch-norm
    """
    # Models, passes, metrics and data named as package.module:name may lie in the current folder.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _error_json(error: PlanishError) -> str:
    """What went wrong, for a script that asked for JSON and would find nothing on stdout."""
    parts = {
        "kind": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "hint": error.hint,
        "replay": error.replay,
        "exit_code": error.exit_code,
    }
    return json.dumps({"error": parts}, indent=2)


def main() -> None:
    """Run the command line; a ``PlanishError`` becomes its message and its exit code."""
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing half-written was left", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) went away; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from planish.ir.errors import PlanishError
        from planish.tools.console import printable

        if not isinstance(error, PlanishError):
            raise
        if "--json" in sys.argv:
            click.echo(_error_json(error))
        click.echo(printable(f"error: {error}"), err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(printable(f"note: {note}"), err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
