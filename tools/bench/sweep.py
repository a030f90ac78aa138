"""Every architecture of the zoo through planish, each in a process of its own.

    python -m planish.tools.bench.sweep [--only REGEX] [--family F] [--resume] [--jobs N]

Stages: capture, the exact recipe with verification on, portable ONNX, ONNX Runtime against torch on
the sample and on a second probe. An entry passes, ends in a named error of planish, or is a BUG:
wrong numbers, any other exception, a crash, or a limit on time or memory exceeded.

One line of JSON an entry goes to ``build/sweep/results.jsonl`` as it finishes, so an interrupted
sweep goes on with ``--resume``; what an entry printed is in ``build/sweep/logs``. The exit code
is 1 if fewer than 95% pass.
"""

import argparse
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from planish.tools.bench.fetch import models_dir
from planish.tools.bench.sweep_stages import STAGES, Outcome, Status, child
from planish.tools.bench.zoo import ZooEntry, zoo

PASS_SHARE = 0.95
_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, before any child is forked: the imports cost more than most entries.
_PRELOAD = ["planish.tools.bench.sweep_preload"]


def sweep_dir() -> Path:
    """``build/sweep`` beside ``build/models``."""
    return models_dir().parent / "sweep"


def run_entry(entry: ZooEntry, folder: Path, timeout_seconds: int, memory_gb: float) -> Outcome:
    """Sweep one entry in a child process with limits on its time and its memory."""
    stem = re.sub(r"[^\w.-]", "_", entry.name)
    result, log = folder / "parts" / f"{stem}.json", folder / "logs" / f"{stem}.txt"
    for path in (result, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    start = time.perf_counter()
    process = _CONTEXT.Process(
        target=child,
        args=(entry.name, str(result), str(log), int(memory_gb * 2**30), timeout_seconds),
    )
    process.start()
    process.join(timeout_seconds)
    if process.is_alive():
        process.kill()
        process.join()
        reason = f"no result after {timeout_seconds} s"
    else:
        reason = _how_it_ended(process.exitcode)
    seconds = round(time.perf_counter() - start, 3)
    process.close()
    if result.is_file():
        return Outcome.from_json(result.read_text(encoding="utf-8"))
    tail = log.read_text(encoding="utf-8", errors="replace")[-500:] if log.is_file() else ""
    return Outcome(
        name=entry.name,
        family=entry.family,
        status=Status.BUG,
        stage="process",
        kind="Crash",
        message=f"{reason}; it printed last: {tail}",
        seconds={"process": seconds},
    )


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code} without a result"


def sweep(
    entries: Sequence[ZooEntry], folder: Path, *, jobs: int, timeout_seconds: int, memory_gb: float
) -> Iterator[Outcome]:
    """Sweep entries, ``jobs`` at a time, in the order in which they finish."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(run_entry, entry, folder, timeout_seconds, memory_gb) for entry in entries
        ]
        for future in as_completed(futures):
            yield future.result()


def read_results(path: Path) -> dict[str, Outcome]:
    """Outcomes by name; of several lines for one entry the last counts."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {outcome.name: outcome for outcome in map(Outcome.from_json, lines)}


def pass_share(outcomes: Sequence[Outcome]) -> float:
    """Share of the outcomes that passed, 0..1; 0 for none at all."""
    passed = sum(outcome.status is Status.PASS for outcome in outcomes)
    return passed / len(outcomes) if outcomes else 0.0


def script_share(outcomes: Sequence[Outcome]) -> float:
    """Share of the outcomes with a TorchScript file equal to the program, 0..1."""
    passed = sum(outcome.facts.get("torchscript") == "pass" for outcome in outcomes)
    return passed / len(outcomes) if outcomes else 0.0


def print_tables(outcomes: Sequence[Outcome]) -> None:
    """Print one row an entry, the reasons of those that did not pass, and totals by family."""
    from rich.console import Console
    from rich.table import Table

    stages = ["build", *(stage.name for stage in STAGES)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("entry", "status", "operators", "rewrites", title="sweep, seconds by stage")
    for stage in stages:
        table.add_column(stage, justify="right")
    for outcome in sorted(outcomes, key=lambda o: (o.family, o.name)):
        facts = outcome.facts
        operators = f"{facts.get('operators', '')} > {facts.get('operators_after', '')}"
        times = [f"{outcome.seconds[s]:.1f}" if s in outcome.seconds else "" for s in stages]
        row = (outcome.name, _colored(outcome), operators, str(facts.get("changes", "")), *times)
        table.add_row(*row)
    console.print(table)
    for outcome in outcomes:
        if outcome.status is not Status.PASS:
            message = outcome.message.replace("\n", "\n    ")
            console.print(
                f"{outcome.name}: {outcome.kind} in {outcome.stage}\n    {message}", markup=False
            )
        script = outcome.facts.get("torchscript", "pass")
        if script != "pass":
            console.print(f"{outcome.name}: no TorchScript file\n    {script}", markup=False)
    columns = ("family", "entries", "pass", "error", "BUG", "share", "TorchScript")
    totals = Table(*columns, title="totals")
    families = sorted({outcome.family for outcome in outcomes})
    for family in [*families, "all"]:
        members = [o for o in outcomes if family in (o.family, "all")]
        counts = [str(sum(o.status is status for o in members)) for status in Status]
        shares = f"{pass_share(members):.1%}", f"{script_share(members):.1%}"
        totals.add_row(family, str(len(members)), *counts, *shares)
    console.print(totals)


def _colored(outcome: Outcome) -> str:
    color = {Status.PASS: "green", Status.ERROR: "yellow", Status.BUG: "red"}[outcome.status]
    label = outcome.kind if outcome.status is Status.ERROR else str(outcome.status)
    return f"[{color}]{label}[/]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m planish.tools.bench.sweep",
        description="Take every architecture of the zoo through planish and ONNX Runtime.",
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="entries whose name matches")
    parser.add_argument("--family", help="small, torchvision, timm or transformers")
    parser.add_argument("--resume", action="store_true", help="skip what results.jsonl holds")
    parser.add_argument("--failed", action="store_true", help="redo only what did not pass")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--timeout", type=int, default=180, metavar="S", help="seconds an entry")
    parser.add_argument("--memory", type=float, default=10, metavar="GB", help="address space")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; exit code 1 if fewer than 95% of the chosen entries pass."""
    options = _parser().parse_args(arguments)
    folder = sweep_dir()
    results = folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [
        entry
        for entry in zoo()
        if re.search(options.only, entry.name) and options.family in (None, entry.family)
    ]
    if not chosen:
        print("no entry of the zoo matches", file=sys.stderr)
        return 2
    known = read_results(results)
    if options.failed:
        done = {name: o for name, o in known.items() if o.status is Status.PASS}
    else:
        done = known if options.resume else {}
    # A partial sweep replaces its own lines and keeps the others.
    names = {entry.name for entry in chosen}
    kept = {name: o for name, o in known.items() if name not in names or name in done}
    results.write_text("".join(o.to_json() + "\n" for o in kept.values()), encoding="utf-8")
    todo = [entry for entry in chosen if entry.name not in done]
    outcomes = [done[name] for name in done if name in names]
    start = time.perf_counter()
    with results.open("a", encoding="utf-8") as stream:
        for outcome in sweep(
            todo,
            folder,
            jobs=options.jobs,
            timeout_seconds=options.timeout,
            memory_gb=options.memory,
        ):
            outcomes.append(outcome)
            stream.write(outcome.to_json() + "\n")
            stream.flush()
            label = outcome.status if not outcome.kind else f"{outcome.status} {outcome.kind}"
            progress = f"[{len(outcomes)}/{len(chosen)}] {time.perf_counter() - start:5.0f} s"
            print(f"{progress}  {outcome.name}: {label}", flush=True)
    print_tables(outcomes)
    return 0 if pass_share(outcomes) >= PASS_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
