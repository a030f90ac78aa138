"""Use an installed planish as a stranger would: optimize a small model, export it, run the file."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch

import planish


class ConvBn(torch.nn.Module):
    """A convolution and its batch normalization: one exact rewrite to find."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.bn = torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] -> features [B, 8, H-2, W-2]."""
        return torch.relu(self.bn(self.conv(x)))


def main() -> None:
    """Fail loudly unless the exported file answers as the model does."""
    home = Path(planish.__file__).resolve()
    if not home.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"planish was imported from {home}, not from the installed wheel")
    torch.manual_seed(0)
    model = ConvBn().eval()
    x = torch.randn(2, 3, 16, 16)
    result = planish.optimize(model, (x,))
    if not any(entry["changes"] for entry in result.report.to_dict()["passes"]):
        raise SystemExit("the exact recipe changed nothing in a model it must change")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "smoke.onnx"
        result.export(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x).detach().numpy()
    error = float(np.abs(answer - expected).max() / max(1e-6, np.abs(expected).max()))
    if not error < 1e-4:
        raise SystemExit(f"the exported file differs from the model: {error:.3g}")
    print(f"exported and equal, largest relative difference {error:.2g}")


if __name__ == "__main__":
    main()
