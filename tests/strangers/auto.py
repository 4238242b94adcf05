"""Hugging Face's AutoModels of several families, from local configurations."""

from typing import Any

import lightning as L
import torch
from strangers.byhand import IGNORED
from strangers.data import Records, scenes
from strangers.dense import Scenes
from strangers.hugging_face import HuggingFaceModule, TokenClassification, Transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

BERT = {"num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[
    str, tuple[str, str, dict[str, int]]
] = {  # name of the width, of the width inside, and how small it is
    "distilbert": ("dim", "hidden_dim", {"n_layers": 1, "n_heads": 2}),
    "gpt2": ("n_embd", "n_inner", {"n_layer": 1, "n_head": 2}),
    "modernbert": (
        "hidden_size",
        "intermediate_size",
        {"num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "roberta": (
        "hidden_size",
        "intermediate_size",
        {"num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}


def auto(kind: str, head: str, outputs: int, width: int) -> nn.Module:
    """A small model of a family, with a head."""
    import transformers

    outer, inner, small = CONFIGS[kind]
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 29)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=30,
        num_labels=outputs,
        pad_token_id=0,
        **{outer: width, inner: width},
        **small,
        **tokens,
    )
    return getattr(transformers, f"AutoModelFor{head}").from_config(config)


class AutoClassifier(Transformer):
    """A DistilBERT beside models of other families."""

    def sidekick(self, outputs: int) -> nn.Module:
        return auto("distilbert", self.head, outputs, 8)


class Roberta(AutoClassifier):
    def module(self) -> L.LightningModule:
        return HuggingFaceModule(auto("roberta", self.head, 3, 16))


class ModernBERT(AutoClassifier):
    def module(self) -> L.LightningModule:
        return HuggingFaceModule(auto("modernbert", self.head, 3, 16))


class GPT2(AutoClassifier):
    """Of the logits of all tokens those of the last that is no padding."""

    def module(self) -> L.LightningModule:
        return HuggingFaceModule(auto("gpt2", self.head, 3, 16))


class AutoTokens(TokenClassification):
    def module(self) -> L.LightningModule:
        return HuggingFaceModule(auto("roberta", self.head, 3, 16))

    def sidekick(self, outputs: int) -> nn.Module:
        return auto("distilbert", self.head, outputs, 8)


class Enlarged(nn.Module):
    """A SegFormer whose logits have the size of the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.interpolate(self.model(pixel_values).logits, scale_factor=4.0, mode="bilinear")


class SegFormer(Scenes):
    """Logits of a quarter of the mask's size, which the model enlarges for its loss."""

    needs = ("transformers",)
    takes_batch = True
    sizes = (32, 16, 8)

    def segformer(self, outputs: int, width: int) -> nn.Module:
        import transformers

        config = transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[1, 1],
            hidden_sizes=[width, width],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 1],
            mlp_ratios=[1, 1],
            decoder_hidden_size=width,
            num_labels=outputs,
        )
        return transformers.AutoModelForSemanticSegmentation.from_config(config)

    def module(self) -> L.LightningModule:
        return HuggingFaceModule(self.segformer(3, 16))

    def data(self, count: int, seed: int) -> Dataset:
        x, y = scenes(count, seed, size=(4, 4), noise=1.0)
        x, y = (part.repeat_interleave(4, -1).repeat_interleave(4, -2) for part in (x, y))
        y[:, 0] = 255
        return Records(x, y, make=lambda a, b: {"pixel_values": a, "labels": b})

    def sidekick(self, outputs: int) -> nn.Module:
        return Enlarged(self.segformer(outputs, 8))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"pixel_values": batch["pixel_values"]}

    def logits(self, module: Any, batch: Any) -> Tensor:
        small = module.model(batch["pixel_values"]).logits
        return F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch["labels"] == 255, IGNORED, batch["labels"])
