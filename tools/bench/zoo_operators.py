"""Hand-written modules that compute what passes look for, and operators that are rarely used."""

# ruff: noqa: D102 - a forward is described by the docstring of its class

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Einsum(nn.Module):
    """Attention written with einsum, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8, 2, 4) / 3)
        self.key = nn.Parameter(torch.randn(8, 2, 4) / 3)
        self.form = nn.Parameter(torch.randn(3, 8, 8) / 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        queries = torch.einsum("btd,dhk->bhtk", x, self.query)
        keys = torch.einsum("btd,dhk->bhtk", x, self.key)
        weights = torch.einsum("bhtk,bhsk->bhts", queries, keys).softmax(dim=-1)
        mixed = torch.einsum("bhts,bsd->btd", weights, x)
        return mixed, torch.einsum("btd,cde,bte->btc", mixed, self.form, x)


class HandAttention(nn.Module):
    """Multi-head attention by hand with a padding mask, as matmul, scale, mask, softmax, matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(16, 16) for _ in range(3))
        self.output = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape

        def heads(layer: nn.Linear) -> Tensor:
            split: Tensor = layer(x).view(batch, length, 4, width // 4).transpose(1, 2)
            return split

        scores = heads(self.queries) @ heads(self.keys).transpose(-1, -2) / 2.0
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        mixed = scores.softmax(dim=-1) @ heads(self.values)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return output


class WhereAndMask(nn.Module):
    """where, masked_fill, cumsum, gather, scatter and sort on one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        y = torch.where(y > 0, y, y * 0.1)
        values, order = y.sort(dim=-1, descending=True)
        spread = torch.zeros_like(y).scatter(-1, order, values.cumsum(dim=-1))
        return spread.gather(-1, order).masked_fill(x < -1.0, 0.0), order


class IntegerOutputs(nn.Module):
    """Outputs of integer and bool dtype: argmax, top-k places, comparison, count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.linear(x)
        places = logits.topk(3, dim=-1).indices
        positive = logits > 0
        return logits.argmax(dim=-1), places, positive, positive.sum(dim=-1)


class SameOutputTwice(nn.Module):
    """Two outputs that are one tensor, and an output that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(self.linear(x))
        return y, y, x


class ConstantOutput(nn.Module):
    """An output that is a parameter, one that is a Python number, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int, None]:
        return self.linear(x), self.prior, 7, None


class UnusedInput(nn.Module):
    """The second input has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Bags(nn.Module):
    """An embedding bag over fixed bags, and an embedding with a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 6, mode="mean")
        self.embedding = nn.Embedding(20, 6, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        averaged: Tensor = self.bag(ids) + self.embedding(ids).sum(dim=1)
        return averaged


class Upsampler(nn.Module):
    """Transposed convolutions with batch norm, pixel shuffle, nearest and bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.ConvTranspose2d(8, 8, 3, groups=2, output_padding=0, bias=False)
        self.grouped_norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.up(x)))
        y = F.pixel_shuffle(self.grouped_norm(self.grouped(y)), 2)
        y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        return F.interpolate(y, size=(24, 24), mode="bilinear", align_corners=False)


class Convolutions1d(nn.Module):
    """1d convolutions: padded by hand, dilated, depthwise, with batch norm, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.dilated = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.pool = nn.AvgPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, (1, 1))
        y = F.silu(self.norm(self.first(y)))
        pooled: Tensor = self.pool(F.leaky_relu(self.dilated(y), 0.1))
        return pooled


class Convolutions3d(nn.Module):
    """3d convolutions with batch norm, pooling and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(4)
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ConvTranspose3d(4, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.pool(F.elu(self.norm(self.first(x)))))
        return y


class Norms(nn.Module):
    """Group, instance, layer and RMS norm, and a layer norm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.layer = nn.LayerNorm([8, 6, 6])
        self.rms = nn.RMSNorm(6, eps=1e-6)
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rms(self.layer(self.instance(self.group(x))))
        centered = y - y.mean(dim=-1, keepdim=True)
        return (
            centered
            * torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + 1e-5)
            * self.weight
        )


class Gated(nn.Module):
    """Activations written out: tanh GELU, SiLU by sigmoid, hard swish by clamp, gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        gelu = 0.5 * gate * (1 + torch.tanh(0.7978845608 * (gate + 0.044715 * gate.pow(3))))
        y: Tensor = self.down(gelu * self.up(x))
        y = y * torch.sigmoid(y)
        return y * (y + 3).clamp(0, 6) / 6


class ShapeArithmetic(nn.Module):
    """Sizes of the input become sizes and values of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        y = self.linear(x.reshape(-1, width))
        positions = torch.arange(length, device=x.device, dtype=x.dtype) / length
        mean = y.view(batch, length, width).sum(dim=1) / length
        return mean, positions.expand(batch, length) * x.size(0)


class ReshapeChains(nn.Module):
    """Chains of views, transposes, permutes, chunk, stack, unbind and roll that mostly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.packed(x).chunk(3, dim=-1)
        stacked = torch.stack([q, k, v]).permute(1, 2, 0, 3).transpose(1, 2).contiguous()
        first, *rest = stacked.unbind(dim=1)
        y = first.unsqueeze(0).squeeze(0).flatten(1).unflatten(1, (-1, 8)) + sum(rest)
        return torch.roll(y.transpose(1, 2).transpose(1, 2), shifts=1, dims=1).reshape(y.shape)


class Casts(nn.Module):
    """Casts between float32, float64, float16, integers and bool."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Only the input is rounded: a rounded intermediate may fall to either side of a step.
        exact = self.linear(x).double().cumsum(dim=-1)
        return exact, (x * 10).to(torch.int32), x.half().float()


class ScalarInput(nn.Module):
    """A tensor without dimensions as input and as output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        y = (self.linear(x) / temperature).softmax(dim=-1)
        return y, y.max() * temperature


class LinearStack(nn.Module):
    """Linears without activation, scalar factors, dropout, a batch norm after a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 4),
            nn.Identity(),
            nn.Linear(4, 16),
            nn.Dropout(0.5),
            nn.BatchNorm1d(16),
            nn.Linear(16, 8, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x * 2.0) * 0.125 + 1.0
        return y


class Residuals(nn.Module):
    """Convolutions with constants folded every way: padding, scales, shared input, two users."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.second = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.first(F.pad(x, (1, 1, 1, 1))))
        z = F.relu6(self.second(y) * self.scale) + y
        return z, self.pool(z).flatten(1)
