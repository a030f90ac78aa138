"""The bench of structured pruning on a convolutional net, on made-up pictures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from planish.ir.errors import RequirementError
from planish.tools.bench.structure.convnet import METHODS, Row, gain, load, main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawn = torch.Generator().manual_seed(0)
    for part, count in (("train", 200), ("t10k", 60)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=drawn, dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,), generator=drawn, dtype=torch.uint8)
        for kind, data, header in (("images-idx3", pixels, 16), ("labels-idx1", labels, 8)):
            with gzip.open(tmp_path / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + data.numpy().tobytes())
    return tmp_path


def test_every_method_halves_the_work(folder: Path) -> None:
    arguments = ["--data", str(folder), "--images", "192", "--epochs", "1"]
    arguments += ["--calibration", "150", "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    rows = json.loads(result.stdout)
    assert list(rows) == ["trained", *METHODS]
    assert rows["trained"]["agreement"] == 1
    for name in METHODS:
        assert 0.44 < rows[name]["macs"] <= 0.5
        assert 0 <= rows[name]["agreement"] <= 1


def test_the_gain_is_of_the_worst_over_the_best() -> None:
    rows = {
        "trained": Row(1.0, 1.0, 0.9, 0.0),
        "magnitude, a": Row(0.5, 0.40, 0.4, 0.1),
        "magnitude, b": Row(0.5, 0.50, 0.4, 0.1),
        "fisher": Row(0.5, 0.99, 0.4, 0.1),
        "ID, a": Row(0.5, 0.80, 0.8, 0.1),
        "ID, b": Row(0.5, 0.90, 0.8, 0.1),
    }
    assert gain(rows) == pytest.approx(30)


def test_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match="train-images") as caught:
        load(tmp_path, "train")
    assert "apt-get download" in str(caught.value.hint)
