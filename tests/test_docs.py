"""The pages under docs/ are promises: their code runs, their commands print what they show."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from planish.tools.cli import COMMANDS, main
from tests.support.real_models import loaded
from tests.support.repository import ROOT
from tests.support.walkthrough import BUNDLE, DEBUGGING, WRONG, blocks

SPARSITY = (ROOT / "docs" / "sparsity.md").read_text(encoding="utf-8")
STRUCTURE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
TORCH = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")
QUANTIZATION = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")


def shown(block: str) -> list[tuple[list[str], list[str]]]:
    """Each command of a console block, as words, with the lines that it is said to print."""
    found: list[tuple[list[str], list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((shlex.split(line[2:]), []))
        else:
            found[-1][1].append(line)
    return found


def printed(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The exit code of a command and all it wrote."""
    assert command[0] == "planish"
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out + captured.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page assumes it: the model, the wrong pass, and bundles in it."""
    loaded("minilm")  # skips where the package is missing
    from planish.tools.demo import model_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PLANISH_REPRO_DIR", ".")
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "minilm").symlink_to(model_folder())
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    return tmp_path


def test_a_planted_rewrite_is_found_reduced_and_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    walk = [step for block in blocks("console")[:4] for step in shown(block)]
    codes = {"optimize": 3, "bisect": 0, "reduce": 0, "repro": 0}
    assert [command[1] for command, _ in walk] == list(codes)
    bundle = BUNDLE
    for command, expected in walk:
        code, output = printed(
            [word.replace(BUNDLE, bundle) for word in command], monkeypatch, capsys
        )
        assert code == codes[command[1]], output[-500:]
        if command[1] == "optimize":
            (made,) = (p.name for p in folder.iterdir() if p.name.startswith("planish-repro-"))
            bundle = made
        for line in expected:
            here = line.replace(BUNDLE, bundle).replace("/home/me", str(folder))
            wanted = here.removesuffix("...").strip()
            assert wanted in output, (wanted, output)
    module = (folder / "reduced" / "module.py").read_text(encoding="utf-8")
    assert "planish." not in module
    space: dict[str, object] = {"__file__": str(folder / "reduced" / "module.py")}
    exec(compile(module, "module.py", "exec"), space)
    network, inputs, _ = space["build"]()  # type: ignore[operator]
    assert network(*inputs)[0].shape == (2, 16, 384)


def test_the_other_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (rest,) = blocks("console")[4:]
    for command, expected in shown(rest):
        assert not expected
        code, output = printed(command, monkeypatch, capsys)
        assert code == (1 if command[1] == "diff" else 0), output[-500:]
        assert output


def test_the_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[1], "debugging.md", "exec"), {"__name__": "docs"})
    assert "checks" in capsys.readouterr().out


def test_options_and_commands_exist() -> None:
    from planish.tools.bisect import bisect

    options = {name for parameter in bisect.params for name in parameter.opts}
    (table,) = re.findall(r"^\| bad is.*?\n\n", DEBUGGING, re.S | re.M)
    assert set(re.findall(r"`(--[\w-]+)", table)) <= options
    assert set(re.findall(r"`planish ([\w-]+)", DEBUGGING)) <= set(COMMANDS)


# -- quantization.md ------------------------------------------------------------------------------


def on_the_page(language: str) -> list[str]:
    """The code blocks of a language in quantization.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", QUANTIZATION, re.S | re.M)


def without_numbers(text: str) -> str:
    """A text whose figures and line breaks do not matter: they depend on the machine."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", text).split())


def test_the_encoder_becomes_integers_as_the_page_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planish.tools.bench.real_inputs import SENTENCES

    lines = [f"{SENTENCES[i % 12]} {SENTENCES[i * 5 % 12]}" for i in range(32)]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    exec(compile(on_the_page("python")[0], "quantization.md", "exec"), {"__name__": "docs"})
    walk = [step for block in on_the_page("console") for step in shown(block)]
    assert [command[1] for command, _ in walk] == ["quantize", "quantize"]
    for command, expected in walk:
        code, output = printed(command, monkeypatch, capsys)
        assert code == 0, output[-500:]
        assert (folder / command[command.index("-o") + 1]).is_file()
        assert expected
        for line in expected:
            wanted = without_numbers(line.removesuffix("..."))
            assert wanted in without_numbers(output), (line, output)


def test_the_repairs_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "docs"}
    exec(compile(on_the_page("python")[1], "quantization.md", "exec"), space)
    assert (tmp_path / "repaired.onnx").is_file()
    assert "cosine" in capsys.readouterr().out


def test_the_page_names_what_exists() -> None:
    from planish.passes.recipe import RECIPES
    from planish.passes.registry import pass_names
    from planish.tools.quantize import quantize

    def rows(title: str) -> set[str]:
        tables = re.findall(rf"^\| {title} \|.*?\n\n", QUANTIZATION, re.S | re.M)
        return set(re.findall(r"^\| `([\w-]+)`", "".join(tables), re.M))

    assert rows("recipe") == set(RECIPES) - {"none", "exact"}
    unnamed = {"quantize", "cast-half"}  # these are no repairs
    exact = {"smooth-quant", "migrate-gamma", "equalize-layers", "split-outliers"}
    assert exact <= rows("pass") <= set(pass_names()) - unnamed
    options = {name for parameter in quantize.params for name in parameter.opts}
    for name in re.findall(r"`(--[\w-]+)", QUANTIZATION):
        assert name in options, name
    assert set(re.findall(r"`planish ([\w-]+)", QUANTIZATION)) <= set(COMMANDS)


# -- sparsity.md ----------------------------------------------------------------------------------


def test_the_code_on_sparsity_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"^```python\n(.*?)^```", SPARSITY, re.S | re.M):
        exec(compile(block, "sparsity.md", "exec"), space)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"sparse.onnx", "sparse-int4.onnx", "sparse-int8.onnx"}
    output = capsys.readouterr().out
    assert "dB alone, dense" in output
    assert "dB alone, 50% zero" in output
    assert "intensification" in output


def test_the_page_on_sparsity_names_what_exists() -> None:
    from typing import get_args

    from planish.passes.sparsify.methods import Score
    from planish.passes.sparsify.sparsify import Sparsify
    from planish.tools.optimize import optimize

    (scores,) = re.findall(r"^\| score \|.*?\n\n", SPARSITY, re.S | re.M)
    assert set(re.findall(r"^\| `(\w+)`", scores, re.M)) == set(get_args(Score))
    options = {name for parameter in optimize.params for name in parameter.opts}
    for name in re.findall(r"(?:`| )(--[\w-]+)", SPARSITY):
        assert name in options, name
    fields = set(Sparsify.__dataclass_fields__)
    for braces in re.findall(r"sparsify\{([^}]*)\}", SPARSITY):
        assert set(re.findall(r"(\w+)=", braces)) <= fields | {"exclude"}
    assert set(re.findall(r"`planish ([\w-]+)", SPARSITY)) <= set(COMMANDS)
    assert len(SPARSITY.splitlines()) <= 150


# -- torch.md -------------------------------------------------------------------------------------


def test_the_code_on_torch_files_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", TORCH, re.S | re.M):
        exec(compile(block, "torch.md", "exec"), space)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.pt2"}
    output = capsys.readouterr().out
    assert "onednn::qlinear_pointwise" in output or "_int_mm" in output
    assert "torch.Size([5, 8]) torch.Size([5, 8])" in output


def test_the_page_on_torch_files_names_what_exists() -> None:
    from planish.backends.registry import load_target
    from planish.tools.bench_command import bench

    (targets,) = re.findall(r"^\| target \|.*?\n\n", TORCH, re.S | re.M)
    for name, suffix in re.findall(r"^\| `([\w-]+)` \| `([.\w]+)`", targets, re.M):
        assert load_target(name).suffix == suffix
    assert "--trust-code" in {name for parameter in bench.params for name in parameter.opts}
    assert set(re.findall(r"planish ([\w-]+) \./", TORCH)) <= set(COMMANDS)


# -- structure.md ---------------------------------------------------------------------------------


def test_the_code_on_structure_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"^```python\n(.*?)^```", STRUCTURE, re.S | re.M):
        exec(compile(block, "structure.md", "exec"), space)
    assert {path.name for path in tmp_path.iterdir()} == {"narrow-int8.onnx"}
    output = capsys.readouterr().out
    assert "neurons" in output


def test_the_page_on_structure_names_what_exists() -> None:
    from typing import get_args

    from planish.passes.factorize.factorize import Factorize
    from planish.passes.factorize.factors import Method
    from planish.passes.factorize.ranks import Rule
    from planish.passes.registry import pass_names

    def rows(title: str) -> set[str]:
        (table,) = re.findall(rf"^\| {title} \|.*?\n\n", STRUCTURE, re.S | re.M)
        cells = re.findall(r"^\| (`.*?) \|", table, re.M)
        return {name for cell in cells for name in re.findall(r"`([\w-]+)", cell)}

    assert rows("method") == set(get_args(Method))
    assert rows("rule") == set(get_args(Rule))
    assert rows("pass") - {"fisher"} <= set(pass_names())
    for braces in re.findall(r"factorize\{([^}]*)\}", STRUCTURE):
        assert set(re.findall(r"(\w+)=", braces)) <= set(Factorize.__dataclass_fields__)
