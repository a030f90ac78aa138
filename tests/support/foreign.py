"""Files of torch.export.save, and ways to tamper with files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim


class Small(nn.Module):
    """A parameter, tied and strided weights, buffers of both kinds and a lifted constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("odd", torch.arange(12.0).view(3, 4)[1:, ::2].bfloat16())
        self.register_buffer("gone", torch.ones(2), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.b(self.a(x)) + self.gone + torch.tensor(3.0)
        return {"y": y, "odd": self.odd, "none": None}


def exported_file(folder: Path) -> Path:
    torch.manual_seed(0)
    shapes = {"x": {0: Dim("batch")}}
    exported = torch.export.export(Small().eval(), (torch.randn(3, 2),), dynamic_shapes=shapes)
    path = folder / "foreign.pt2"
    torch.export.save(exported, path)
    return path


Edit = Callable[[dict[str, bytes]], None]


def edited(source: Path, folder: Path, edit: Edit) -> Path:
    """The file with its entries changed."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    edit(entries)
    path = folder / "edited.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def edit_json(suffix: str, change: Callable[[Any], Any]) -> Edit:
    """Change the one JSON entry whose name ends so."""

    def edit(entries: dict[str, bytes]) -> None:
        (name,) = (n for n in entries if n.endswith(suffix))
        data = json.loads(entries[name])
        changed = change(data)
        entries[name] = json.dumps(data if changed is None else changed).encode()

    return edit
