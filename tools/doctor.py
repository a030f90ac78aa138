"""``planish doctor``: what this machine and this installation can do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

from planish.tools.console import print_json, stdout

_REQUIRED = ("torch", "numpy", "networkx", "onnx", "onnx-ir", "onnxscript", "onnxruntime",
             "safetensors", "pyyaml", "rich", "click")  # fmt: skip
_OPTIONAL = {
    "transformers": "local Hugging Face folders as MODEL",
    "openvino": "checking portable files in a second engine",
}
_FLAGS = {
    "avx2": "256-bit vectors",
    "avx512f": "512-bit vectors",
    "avx512_vnni": "int8 products without saturation",
    "avx_vnni": "int8 products without saturation",
    "amx_int8": "int8 matrix tiles",
    "amx_bf16": "bf16 matrix tiles",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Check the installation and say what the machine is good for.

    \b
    Examples:
      planish doctor
      planish doctor --json
    """
    facts = examine()
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    return 1 if facts["problems"] else 0


def examine() -> dict[str, object]:
    """Versions, processor features and problems, as plain data."""
    versions = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    problems = [f"{n} is not installed: pip install {n}" for n in _REQUIRED if not versions[n]]
    providers: list[str] = []
    if versions["onnxruntime"]:
        import onnxruntime

        providers = list(onnxruntime.get_available_providers())
        if "CPUExecutionProvider" not in providers:
            problems.append("this onnxruntime has no CPUExecutionProvider")
    if _broken("torchvision"):
        problems.append(
            "torchvision does not import beside this torch, which breaks transformers and timm: "
            "install the build that matches, or pip uninstall torchvision"
        )
    flags = _cpu_flags()
    return {
        "planish": _version("planish"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cpu": {flag: flag in flags for flag in _FLAGS},
        "versions": versions,
        "onnxruntime_providers": providers,
        "optional": dict(_OPTIONAL),
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _broken(module: str) -> bool:
    """Whether a module is installed and fails to import, tried in a process of its own."""
    code = (
        "import importlib.util as u\n"
        f"if u.find_spec({module!r}) is not None:\n"
        f"    import {module}\n"
    )
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return tried.returncode != 0


def _cpu_flags() -> set[str]:
    """Processor features; empty where the system does not say."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    for line in info.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _print(facts: dict[str, object]) -> None:
    console = stdout()
    console.print(f"planish {facts['planish']}, Python {facts['python']}, {facts['system']}, "
                  f"{facts['cores']} cores")  # fmt: skip
    for name, version in facts["versions"].items():  # type: ignore[attr-defined]
        purpose = f"  ({_OPTIONAL[name]})" if name in _OPTIONAL else ""
        console.print(f"  {name:14} {version or 'not installed'}{purpose}")
    console.print(f"  providers      {', '.join(facts['onnxruntime_providers'])}")  # type: ignore[arg-type]
    cpu: dict[str, bool] = facts["cpu"]  # type: ignore[assignment]
    console.print("processor: " + ", ".join(f"{f} ({_FLAGS[f]})" for f, has in cpu.items() if has))
    problems: list[str] = facts["problems"]  # type: ignore[assignment]
    for problem in problems:
        console.print(f"problem: {problem}")
    if not problems:
        console.print("no problems found")
