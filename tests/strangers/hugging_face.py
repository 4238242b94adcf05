"""Hugging Face's models as they are trained in Lightning; needs transformers."""

from typing import Any

import lightning as L
import torch
from strangers.data import Records, images, labels, sentences, topics
from strangers.judge import Stranger
from strangers.models import Optimized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate


def bert(head: str, outputs: int, width: int = 16, **config: Any) -> nn.Module:
    """A small BERT with a head: "SequenceClassification" or "TokenClassification"."""
    import transformers

    settings = transformers.BertConfig(
        vocab_size=30,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=width,
        max_position_embeddings=16,
        num_labels=outputs,
        **config,
    )
    return getattr(transformers, f"BertFor{head}")(settings)


class HuggingFaceModule(Optimized):
    """self.model(**batch).loss, the shortest of all steps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)


class Transformer(Stranger):
    """Batches with input_ids, attention_mask and labels."""

    needs = ("transformers",)
    head = "SequenceClassification"

    def data(self, count: int, seed: int) -> Dataset:
        ids, _, _ = sentences(count, seed)
        return Records(ids, topics(ids, seed), make=self.record)

    def record(self, ids: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": label}

    def sidekick(self, outputs: int) -> nn.Module:
        return bert(self.head, outputs, 8)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {k: v for k, v in batch.items() if k != "labels"}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.model(**self.inputs(batch)[1]).logits

    def targets(self, batch: Any) -> Tensor:
        return batch["labels"]


class SequenceClassification(Transformer):
    def module(self) -> L.LightningModule:
        return HuggingFaceModule(bert(self.head, 3))


class TokenClassification(Transformer):
    """Named entities: only the first piece of a word has a label, others and padding -100."""

    layout = "tokens"
    head = "TokenClassification"

    def module(self) -> L.LightningModule:
        return HuggingFaceModule(bert(self.head, 3))

    def data(self, count: int, seed: int) -> Dataset:
        ids, _, tags = sentences(count, seed)
        is_first = (ids != 0) & (ids % 4 != 3)
        return Records(ids, torch.where(is_first, tags, -100), make=self.record)


class TutorialModule(HuggingFaceModule):
    """Lightning's tutorial on GLUE: forward(**inputs), outputs[:2], a dict returned."""

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(**batch)
        return outputs[0]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        outputs = self(**batch)
        val_loss, logits = outputs[:2]
        preds = torch.argmax(logits, axis=1)
        self.log("val_loss", val_loss)
        return {"loss": val_loss, "preds": preds, "labels": batch["labels"]}


class GlueTutorial(Transformer):
    """With token_type_ids, and a DistilBERT beside it that does not take them."""

    def module(self) -> L.LightningModule:
        return TutorialModule(bert(self.head, 3))

    def record(self, ids: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {**super().record(ids, label), "token_type_ids": torch.zeros_like(ids)}

    def sidekick(self, outputs: int) -> nn.Module:
        import transformers

        settings = transformers.DistilBertConfig(
            vocab_size=30, dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=outputs
        )
        return transformers.DistilBertForSequenceClassification(settings)

    def side(self, model: nn.Module, batch: Any) -> Tensor:
        """A DistilBERT itself would refuse token_type_ids."""
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class OwnLossModule(HuggingFaceModule):
    """The labels are popped, the arguments named, the loss is the user's own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def _loss(self, batch: Any) -> Tensor:
        logits = self(batch["input_ids"], batch["attention_mask"])
        return F.cross_entropy(logits.view(-1, 3), batch["labels"].view(-1), label_smoothing=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))


class OwnLoss(Transformer):
    """Batches are BatchEncodings, as tokenizers and their collators give them."""

    def module(self) -> L.LightningModule:
        return OwnLossModule(bert(self.head, 3))

    def loaders(self) -> tuple[Any, Any]:
        from transformers import BatchEncoding

        def collate(samples: list[Any]) -> Any:
            return BatchEncoding(default_collate(samples))

        return (
            DataLoader(self.data(192, 1), 16, shuffle=True, collate_fn=collate),
            DataLoader(self.data(96, 2), 16, collate_fn=collate),
        )

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["input_ids"], batch["attention_mask"]), {}

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(*self.inputs(batch)[0])


class ManyLabels(Transformer):
    """problem_type="multi_label_classification", labels float."""

    layout = "labels"

    def module(self) -> L.LightningModule:
        return HuggingFaceModule(bert(self.head, 4, problem_type="multi_label_classification"))

    def data(self, count: int, seed: int) -> Dataset:
        ids, _, _ = sentences(count, seed)
        return Records(ids, labels((ids[:, :4] - 15) / 8, seed), make=self.record)

    def sidekick(self, outputs: int) -> nn.Module:
        return bert(self.head, outputs, 8, problem_type="multi_label_classification")


class VisionTransformer(Transformer):
    """{"pixel_values", "labels"} through forward(**batch)."""

    def module(self) -> L.LightningModule:
        return TutorialModule(self.vit(3, 16))

    def vit(self, outputs: int, width: int) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(
            ViTConfig(
                hidden_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=width,
                image_size=12,
                patch_size=6,
                num_labels=outputs,
            )
        )

    def data(self, count: int, seed: int) -> Dataset:
        parts = images(count, seed)
        return Records(*parts, make=lambda x, y: {"pixel_values": x, "labels": y})

    def sidekick(self, outputs: int) -> nn.Module:
        return self.vit(outputs, 8)
