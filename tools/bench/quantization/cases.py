"""The models of the quantization table: how they are fed, and how near a file must stay.

Calibration and judgment never share data: other documents, other pictures, other words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.tools.bench import real_inputs, real_nets
from planish.tools.bench.fetch import locate
from planish.tools.bench.quantization import judges
from planish.tools.bench.quantization.digits import digit_batches
from planish.tools.bench.real_models import real_model
from planish.tools.bench.torchvision_shim import import_timm

Inputs: TypeAlias = tuple[Tensor, ...]
Judge: TypeAlias = "Callable[[Sequence[Inputs], Sequence[Tensor], Sequence[Tensor]], judges.Scores]"

SIDE = 224


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the table.

    Attributes:
        name: as the table calls it.
        load: the network in eval mode.
        timed: the inputs that are timed, of batch 1.
        calibration: batches to take ranges from.
        held: batches to judge by.
        judge: (held inputs, what float gives, what a candidate gives) -> figures.
        dynamic_shapes: as ``torch.export`` takes it.
        extra: further positional arguments of ``forward`` that are no tensors.
        recipe: of planish for ONNX Runtime.
        portable: of planish for other runtimes.
        padding_mask: name of the input that is 0 at padding.
        transformer: whether rivals should treat it as one.
        dynamic: whether ONNX Runtime's dynamic quantizer has anything to do here.
        speed: least ratio that is asked of the file over plain float.
        goals: figure -> the least that is asked of it.
    """

    name: str
    load: Callable[[], nn.Module]
    timed: Callable[[], Inputs]
    calibration: Callable[[], list[Inputs]]
    held: Callable[[], list[Inputs]]
    judge: Judge = judges.signal
    dynamic_shapes: Any = None
    extra: tuple[Any, ...] = ()
    recipe: str = "int8"
    portable: str = "int8-static"
    padding_mask: str | None = None
    transformer: bool = False
    dynamic: bool = False
    speed: float = 1.0
    goals: Mapping[str, float] = field(default_factory=dict)


# -- text -----------------------------------------------------------------------------------------


def _news_sentences() -> list[str]:
    """Sentences of gensim's news, in order, of 4 words or more."""
    path = locate("gensim", "gensim/test/test_data/lee_background.cor")
    text = path.read_text(encoding="utf-8").replace("\n", " ")
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if len(s.split()) >= 4]


def _encoded(texts: Sequence[str], longest: int) -> Inputs:
    tokenizer = real_inputs.minilm_tokenizer()
    rows = tokenizer(
        list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    return rows["input_ids"], rows["attention_mask"]


def _batched(texts: Sequence[str], size: int, longest: int) -> list[Inputs]:
    return [_encoded(texts[i : i + size], longest) for i in range(0, len(texts), size)]


def _minilm_calibration() -> list[Inputs]:
    return _batched(_news_sentences()[:512:2], 4, 128)


def _minilm_held() -> list[Inputs]:
    """200 other sentences, then the 50 documents whose similarity people judged."""
    sentences = _news_sentences()[-400::2]
    return _batched(sentences, 8, 128) + _batched(judges.lee50_documents(), 10, 256)


def _minilm_timed() -> Inputs:
    rows = real_inputs.sentence_batch(1, 128)
    return rows["input_ids"], rows["attention_mask"]


def _tokens(count: int, seed: int, vocabulary: int = 50257) -> list[Inputs]:
    """Batches of 2 x 64 random tokens."""
    made = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, vocabulary, (2, 64), generator=made),) for _ in range(count)]


# -- pictures -------------------------------------------------------------------------------------


def crops(pictures: slice, each: int, mean_std: real_inputs.MeanStd, batch: int) -> list[Inputs]:
    """Random crops of some of foolbox's pictures, of 20 to 50 % of the shorter edge.

    They show parts of things, so that decisions are close and quantization can turn them over.
    """
    made = torch.Generator().manual_seed(pictures.start or 0)
    tensors = []
    for picture, _ in real_inputs.labeled_pictures()[pictures]:
        for _ in range(each):
            share, left, top = torch.rand(3, generator=made).tolist()
            edge = round(min(picture.size) * (0.2 + 0.3 * share))
            x, y = round((picture.width - edge) * left), round((picture.height - edge) * top)
            crop = picture.crop((x, y, x + edge, y + edge))
            tensors.append(real_inputs.picture_tensor(crop, SIDE, mean_std))
    return [(torch.stack(tensors[i : i + batch]),) for i in range(0, len(tensors), batch)]


_CALIBRATING, _HELD = slice(0, 10), slice(10, 20)


def _pictures(mean_std: real_inputs.MeanStd, held_each: int = 20, **fields: Any) -> Case:  # noqa: ANN401 - those of Case
    """A case whose data are crops; ``fields`` may say otherwise."""
    parts: dict[str, Any] = {
        "timed": lambda: crops(slice(10, 11), 1, mean_std, 1)[0],
        "calibration": lambda: crops(_CALIBRATING, 7, mean_std, 2),
        "held": lambda: crops(_HELD, held_each, mean_std, 4),
    }
    return Case(**{**parts, **fields})


def _timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model(name, pretrained=False)
    return model.eval()


class DinoFeatures(nn.Module):
    """What DINOv2 is used for: pixels [B, 3, H, W] -> the class token's features [B, 384]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized features of the class token."""
        hidden: Tensor = self.backbone(pixels).last_hidden_state
        return hidden[:, 0]


def _dino() -> nn.Module:
    return DinoFeatures(real_nets.load_dinov2().backbone).eval()  # type: ignore[arg-type]  # a module


def _dino_held() -> list[Inputs]:
    """40 crops for the signal, then digits: first those that train the probe."""
    return crops(_HELD, 4, real_inputs.IMAGENET_MEAN_STD, 4) + digit_batches(judges.DIGITS, 4)


# -- words ----------------------------------------------------------------------------------------


def _vocabulary() -> list[str]:
    words = {w.strip(".,;:!?\"'()") for s in _news_sentences() for w in s.split()}
    return sorted(w for w in words if w.isascii() and w.isalpha() and 3 <= len(w) <= 9)


def _words(start: int, count: int) -> list[str]:
    words = _vocabulary()
    return [words[(start + 37 * i) % len(words)] for i in range(count)]


def _images(words: Sequence[str], batch: int) -> list[Inputs]:
    drawn = [real_inputs.rendered_word(word, 200) for word in words]
    return [(torch.stack(drawn[i : i + batch]),) for i in range(0, len(drawn), batch)]


def _gpt2() -> nn.Module:
    transformers = real_nets.require("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    return real_nets.CausalLM(model).eval()


_HELD_WORDS = partial(_words, 11, 200)

CASES: tuple[Case, ...] = (
    Case(
        name="minilm",
        load=real_nets.load_minilm,
        timed=_minilm_timed,
        calibration=_minilm_calibration,
        held=_minilm_held,
        judge=judges.sentences,
        dynamic_shapes=real_model("minilm").dynamic_shapes,
        padding_mask="attention_mask",
        transformer=True,
        dynamic=True,
        speed=2.6,
        goals={"cosine": 0.997, "lee50_loss": -0.005},
    ),
    _pictures(
        real_inputs.LITE0_MEAN_STD,
        name="efficientnet-lite0",
        load=real_nets.load_lite0,
        judge=judges.classes,
        dynamic_shapes=real_model("efficientnet-lite0").dynamic_shapes,
        speed=2.15,
        goals={"sqnr_db": 17.0, "same_top1": 0.88},
    ),
    _pictures(
        real_inputs.IMAGENET_MEAN_STD,
        4,
        name="resnet50 (random weights)",
        load=partial(_timm, "resnet50"),
        dynamic_shapes=({0: Dim("batch", max=64)},),
        speed=3.3,
        goals={"sqnr_db": 36.0},
    ),
    _pictures(
        real_inputs.IMAGENET_MEAN_STD,
        4,
        name="vit-tiny (random weights)",
        load=partial(_timm, "vit_tiny_patch16_224"),
        dynamic_shapes=({0: Dim("batch", max=64)},),
        transformer=True,
        dynamic=True,
        speed=1.7,
        goals={"sqnr_db": 28.0},
    ),
    _pictures(
        real_inputs.IMAGENET_MEAN_STD,
        name="dinov2-s",
        load=_dino,
        held=_dino_held,
        judge=judges.probe,
        # More than is asked for: the bound is kept on other pictures than those judged.
        recipe="int8-dynamic,keep-float{min_sqnr_db=33}",
        dynamic_shapes=({0: Dim("batch", max=64)},),
        transformer=True,
        dynamic=True,
        speed=1.7,
        goals={"sqnr_db": 28.0, "probe_loss": -0.01},
    ),
    Case(
        name="gpt2-small (random weights)",
        load=_gpt2,
        timed=lambda: (_tokens(1, 3)[0][0][:1],),
        calibration=lambda: _tokens(16, 1),
        held=lambda: _tokens(8, 2),
        dynamic_shapes=({0: Dim("batch", max=64), 1: Dim("sequence", min=2, max=512)},),
        transformer=True,
        dynamic=True,
        speed=1.8,
        goals={"sqnr_db": 25.0},
    ),
    Case(
        name="crnn",
        load=real_nets.load_crnn,
        timed=lambda: _images(["harbor"], 1)[0],
        calibration=lambda: _images(_words(0, 64), 2),
        held=lambda: _images(_HELD_WORDS(), 4),
        judge=lambda held, reference, found: judges.words(_HELD_WORDS(), reference, found),
        dynamic_shapes=real_model("crnn-english-g2").dynamic_shapes,
        extra=(None,),
        dynamic=True,
        speed=1.3,
        goals={"word_loss": -0.005},
    ),
)
