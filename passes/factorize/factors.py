"""One matrix as the product of two thin ones, with the least error of what it computes.

Of all ``A B`` of rank r that of least ``||W X - A B X||`` has the first r left singular vectors
``U`` of ``W X`` for A, and ``U^T W`` for B. With ``G = X X^T = L L^T`` those are the left singular
vectors of ``W L``, and the error is what their tail of singular values says. ``L`` is taken from
the eigenvalues of G, so that a rank-deficient G needs no special case, and nothing is inverted;
directions that no row has count next to nothing, but what rank is left goes to those of W there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Method = Literal["svd", "whitened", "fisher"]
# Eigenvalues of G below this share of the largest, or of what was read, are rounding errors.
_FLOOR = 1e-12
_ROUNDING = 1e-14
# Of the mean eigenvalue of S, which is estimated from few random directions.
_METRIC_FLOOR = 1e-2


@dataclass(frozen=True)
class Moments:
    """What a layer reads, over all calibration rows; float64.

    Attributes:
        second: ``E[x x^T]``, [inputs, inputs], of what it reads in the program as it is by now.
        mean: ``E[x]``, [inputs].
        cross: ``E[x0 x^T]`` with what it read in the program before, or None where that is equal.
        mean_before: ``E[x0]``, or None.
        rows: how many.
        drift: ``E[(s0 - s) x^T]``, [outputs, inputs], where the layer's output is added to s, which
            was s0 in the program before: what the layer can make up for of that; or None.
        mean_drift: ``E[s0 - s]``, [outputs], or None.
    """

    second: Tensor
    mean: Tensor
    cross: Tensor | None = None
    mean_before: Tensor | None = None
    rows: int = 0
    drift: Tensor | None = None
    mean_drift: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """A matrix to be factored.

    Attributes:
        rows: the weight W, [outputs, inputs].
        moments: of its inputs; whitened needs them.
        fisher: sums of squared gradients of each output's weights, [outputs]; fisher needs them.
        importance: what an error of the outputs makes of the model's outputs, [outputs, outputs]
            (see importance), or None where all errors count alike.
        counts: how often each input comes alone, [inputs], in place of moments: of a table.
        center: whether the bias takes up the mean of the error.
        damping: share of the mean of diag G that is added to it where W is fitted anew.
    """

    rows: Tensor
    moments: Moments | None = None
    fisher: Tensor | None = None
    importance: Tensor | None = None
    counts: Tensor | None = None
    center: bool = True
    damping: float = 1e-2


@dataclass(frozen=True)
class Basis:
    """A task solved for all ranks at once.

    Attributes:
        target: what is truncated, [outputs, inputs] float64: W, or W fitted to what is read now.
        vectors: orthonormal columns, most important first, [outputs, min(outputs, inputs)].
        spectrum: singular values; the tail's norm is the error in the method's own measure.
        metric: applied to the outputs before vectors are, [outputs, outputs], and its inverse; None
            for the identity.
        task: what was solved.
    """

    target: Tensor
    vectors: Tensor
    spectrum: Tensor
    metric: tuple[Tensor, Tensor] | None = None
    task: Task = field(repr=False, kw_only=True)

    def energy(self, rank: int) -> float:
        """What a rank loses, in the method's own measure squared."""
        return float(self.spectrum[rank:].square().sum())

    def error(self, rank: int) -> float:
        """Relative error of a rank in the method's own measure, 0 to 1."""
        energy = self.spectrum.square()
        total = float(energy.sum())
        return (float(energy[rank:].sum()) / total) ** 0.5 if total else 0.0

    def factors(self, rank: int) -> Factors:
        """The two matrices of a rank.

        Raises:
            ValueError: the rank is not between 1 and the smaller side.
        """
        if not 1 <= rank <= len(self.spectrum):
            raise ValueError(f"rank is {rank}, not between 1 and {len(self.spectrum)}")
        u = self.vectors[:, :rank]
        if self.metric is None:
            second, first = u, u.t() @ self.target
        else:
            into, back = self.metric
            second, first = back @ u, u.t() @ (into @ self.target)
            size = second.norm(dim=0).mean()  # 1 without a metric, which may be of any size
            second, first = second / size, first * size
        return Factors(first, second, self._shift(second @ first))

    def _shift(self, product: Tensor) -> Tensor | None:
        """What the bias has to add so that the mean of the output stays: ``W mu0 - A B mu``."""
        moments = self.task.moments
        if not self.task.center or moments is None:
            return None
        before = moments.mean if moments.mean_before is None else moments.mean_before
        shift = self.task.rows.double() @ before - product @ moments.mean
        return shift if moments.mean_drift is None else shift + moments.mean_drift


@dataclass(frozen=True)
class Factors:
    """``W x + b`` as ``second (first x) + b + shift``; float64.

    Attributes:
        first: B, [rank, inputs].
        second: A, [outputs, rank].
        shift: for the bias, [outputs], or None.
    """

    first: Tensor
    second: Tensor
    shift: Tensor | None


def solve(task: Task, method: Method) -> Basis:
    """The best factors of every rank.

    Args:
        task: the matrix.
        method: "svd" (least error of the weight), "whitened" (of the output on the calibration
            inputs; SVD-LLM, DRONE), "fisher" (of the weight, outputs weighted by what the loss
            makes of them; FWSVD).

    Raises:
        ValueError: the method lacks its statistics, or a number is not finite.
    """
    w = task.rows.double()
    if not bool(w.isfinite().all()):
        raise ValueError("the weight is not finite")
    if method == "svd":
        vectors, spectrum = _left(w)
        return Basis(w, vectors, spectrum, task=task)
    if method == "fisher":
        if task.fisher is None:
            raise ValueError("fisher needs gradients of the loss")
        scale = _row_weights(task.fisher)
        metric = (torch.diag(scale), torch.diag(1 / scale))
        vectors, spectrum = _left(metric[0] @ w)
        return Basis(w, vectors, spectrum, metric, task=task)
    if task.counts is not None:
        target, seen = w, w * task.counts.double().sqrt()
    elif task.moments is not None:
        target = _fitted(w, task)
        seen = target @ _root(_covariance(task.moments, center=task.center), task.moments.second)
    else:
        raise ValueError("whitened needs inputs of the layer")
    aim = None if task.importance is None else _metric(task.importance)
    vectors, spectrum = _left(seen if aim is None else aim[0] @ seen)
    return Basis(target, vectors, spectrum, aim, task=task)


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u, s


def _row_weights(fisher: Tensor) -> Tensor:
    """Square roots of the Fisher information of each output, an output nothing depends on kept.

    Without a floor such an output would be divided by zero when its scale is undone.
    """
    root = fisher.double().clamp(min=0).sqrt()
    largest = float(root.max())
    return root.clamp(min=1e-6 * largest) if largest > 0 else torch.ones_like(root)


def _metric(importance: Tensor) -> tuple[Tensor, Tensor] | None:
    """The root of S and its inverse, with a floor under what the samples say nothing of."""
    values, vectors = torch.linalg.eigh(importance)
    mean = float(values.clamp(min=0).mean())
    if mean <= 0:
        return None  # nothing of this layer reaches the outputs
    root = (values.clamp(min=0) + _METRIC_FLOOR * mean).sqrt()
    return (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()


def _covariance(moments: Moments, *, center: bool) -> Tensor:
    if not center:
        return moments.second
    return moments.second - torch.outer(moments.mean, moments.mean)


def _root(gram: Tensor, second: Tensor) -> Tensor:
    """``L`` with ``L L^T`` the Gram matrix, from its eigenvalues; none of them is zero."""
    values, vectors = torch.linalg.eigh(gram)
    least = max(_FLOOR * float(values[-1]), _ROUNDING * float(second.diagonal().max()))
    root: Tensor = vectors * (values.clamp(min=least) if least > 0 else values * 0 + 1).sqrt()
    return root


def _fitted(w: Tensor, task: Task) -> Tensor:
    """The matrix that comes nearest to the output before, from what is read now.

    ``min_M ||W X0 + D - M X||^2``, with D what a sum that the output goes into has lost by now, is
    ``M = (W C + D X^T) (G + d)^-1`` with ``C = X0 X^T``, written as a correction of W so that
    damping pulls towards W and not towards zero.
    """
    moments = task.moments
    assert moments is not None
    if moments.cross is None:
        return w
    assert moments.mean_before is not None
    gram = _covariance(moments, center=task.center)
    cross = moments.cross
    if task.center:
        cross = cross - torch.outer(moments.mean_before, moments.mean)
    mean = float(gram.diagonal().mean())
    if mean <= 0:
        return w  # dead inputs
    damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (task.damping * mean)
    missing = w @ (cross - gram)
    if moments.drift is not None:
        assert moments.mean_drift is not None
        mean_part = torch.outer(moments.mean_drift, moments.mean) if task.center else 0
        missing = missing + moments.drift - mean_part
    change: Tensor = torch.linalg.solve(damped, missing.t()).t()
    return w + change
