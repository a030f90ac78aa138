"""Figures of fidelity: what a quantized file gives beside what the float one gives.

Every judge takes the held-out inputs, the float file's first output for each of them, and a
candidate's. A figure that ends in ``loss`` is the candidate's score less the float one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from planish.ir.compare import Accumulator
from planish.tools.bench.fetch import locate
from planish.tools.bench.quantization.digits import digits
from planish.tools.bench.real_inputs import ctc_text
from planish.tools.bench.real_nets import require

Scores: TypeAlias = dict[str, float]
Batches: TypeAlias = Sequence[tuple[Tensor, ...]]

DIGITS = 500
TRAINING = 200  # digits whose float features train the probe; the others test it


def _sqnr(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    sums = Accumulator()
    for b, a in zip(reference, found, strict=True):
        sums.add(b, a)
    return min(sums.fidelity().sqnr_db, 200.0)  # JSON has no infinity


def signal(held: Batches, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
    """The signal to noise ratio of the output over all batches."""
    return {"sqnr_db": _sqnr(reference, found)}


def classes(held: Batches, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
    """Logits: signal to noise, and the share of inputs whose largest one is the same."""
    wanted, got = torch.cat(list(reference)), torch.cat(list(found))
    same = (wanted.argmax(-1) == got.argmax(-1)).double().mean()
    return {"sqnr_db": _sqnr(reference, found), "same_top1": float(same)}


def lee50_documents() -> list[str]:
    """The 50 documents of which people judged how alike they are."""
    path = locate("gensim", "gensim/test/test_data/lee.cor")
    return path.read_text(encoding="latin-1").splitlines()


def _embeddings(batches: Batches, hidden: Sequence[Tensor]) -> Tensor:
    """Mean over the tokens that are no padding, of length 1."""
    rows = []
    for (_, keep), states in zip(batches, hidden, strict=True):
        mask = keep.unsqueeze(-1)
        rows.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def _lee50(embedding: Tensor) -> float:
    """Correlation of cosines with human similarity, 1225 pairs."""
    numpy = require("numpy")
    folder = locate("gensim", "gensim/test/test_data")
    human = torch.from_numpy(numpy.loadtxt(folder / "similarities0-1.txt")).float()
    rows, columns = torch.triu_indices(50, 50, offset=1)
    pairs = torch.stack([(embedding @ embedding.T)[rows, columns], human[rows, columns]])
    return float(torch.corrcoef(pairs)[0, 1])


def sentences(held: Batches, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
    """Sentence embeddings: mean cosine to float, signal to noise, and Lee50 (the last batches)."""
    wanted, got = (_embeddings(held, h) for h in (reference, found))
    texts = len(wanted) - 50
    cosine = (wanted[:texts] * got[:texts]).sum(-1).mean()
    lee = _lee50(got[texts:])
    return {
        "cosine": float(cosine),
        "sqnr_db": _sqnr([wanted[:texts]], [got[:texts]]),
        "lee50": lee,
        "lee50_loss": -abs(lee - _lee50(wanted[texts:])),
    }


def words(truth: Sequence[str], reference: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
    """Share of printed words that are read without an error."""

    def right(outputs: Sequence[Tensor]) -> float:
        read = [text for logits in outputs for text in ctc_text(logits)]
        return sum(a == b for a, b in zip(truth, read, strict=True)) / len(truth)

    accuracy = right(found)
    return {
        "word_accuracy": accuracy,
        "word_loss": accuracy - right(reference),
        "sqnr_db": _sqnr(reference, found),
    }


def probe(held: Batches, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Scores:
    """Features: signal to noise on pictures, and a linear probe for digits.

    The probe is trained on float features, as one that is in use when the file is swapped.
    """
    labels = digits(DIGITS)[1]
    wanted, got = torch.cat(list(reference)), torch.cat(list(found))
    pictures = len(wanted) - DIGITS
    training, testing = wanted[pictures:][:TRAINING], slice(pictures + TRAINING, None)
    weights = _ridge(training, labels[:TRAINING])

    def accuracy(features: Tensor) -> float:
        answers = _with_one(features) @ weights
        return float((answers.argmax(-1) == labels[TRAINING:]).double().mean())

    score = accuracy(got[testing])
    return {
        "sqnr_db": _sqnr([wanted[:pictures]], [got[:pictures]]),
        "probe": score,
        "probe_loss": score - accuracy(wanted[testing]),
    }


def _with_one(features: Tensor) -> Tensor:
    wide = features.double()
    return torch.cat([wide, torch.ones(len(wide), 1, dtype=torch.float64)], 1)


def _ridge(features: Tensor, labels: Tensor) -> Tensor:
    """Least squares to one-hot labels, with a little weight decay."""
    x = _with_one(features)
    wanted = nn.functional.one_hot(labels, 10).double()
    gram = x.T @ x
    decay = 1e-2 * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(gram + decay, x.T @ wanted)
    return weights
