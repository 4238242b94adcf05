"""Text: taggers, classifiers of sequences, and how Hugging Face's models are trained."""

from typing import Any, ClassVar

import lightning as L
import torch
from strangers.byhand import IGNORED
from strangers.data import points, sentences, topics
from strangers.judge import Stranger
from strangers.models import Optimized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset


class TaggerModule(Optimized):
    """A tag (N, T, K) for each word; the loss wants (N, K, T) and leaves padding out."""

    def __init__(self, classes: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width, padding_idx=0)
        self.rnn = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embedding(tokens))[0])

    def loss(self, batch: Any) -> Tensor:
        tokens, tags = batch
        return F.cross_entropy(self(tokens).permute(0, 2, 1), tags, ignore_index=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Tagger(Stranger):
    layout = "tokens"
    padding = -1

    def module(self) -> L.LightningModule:
        return TaggerModule()

    def data(self, count: int, seed: int) -> Dataset:
        ids, _, tags = sentences(count, seed)
        return TensorDataset(ids, torch.where(ids == 0, self.padding, tags))

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, outputs))

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch[0] == 0, IGNORED, batch[1])


class FlattenedModule(TaggerModule):
    """PyTorch's way: logits and tags flattened for the criterion, the padding tag is ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(ignore_index=-7)

    def loss(self, batch: Any) -> Tensor:
        tokens, tags = batch
        logits = self(tokens)
        return self.criterion(logits.view(-1, logits.shape[-1]), tags.view(-1))


class FlattenedTagger(Tagger):
    padding = -7

    def module(self) -> L.LightningModule:
        return FlattenedModule()


class MaskedModule(TaggerModule):
    """Only what is no padding goes into the loss, picked by a mask of the words."""

    def loss(self, batch: Any) -> Tensor:
        tokens, tags = batch
        active = tokens != 0
        return F.cross_entropy(self(tokens)[active], tags[active])


class MaskedTagger(Tagger):
    padding = 0

    def module(self) -> L.LightningModule:
        return MaskedModule()


class TimeFirstModule(TaggerModule):
    """Batches of other lengths, padded by a collate function, and summed losses over counts."""

    def loss(self, batch: Any) -> Tensor:
        logits = self(batch["tokens"])
        per_word = F.cross_entropy(logits.transpose(1, 2), batch["tags"], reduction="none")
        mask = (batch["tokens"] != 0).float()
        return (per_word * mask).sum() / mask.sum()


class RaggedTagger(Tagger):
    """The padding's tags are 0, a class like others; only the mask behind the loss says so."""

    def module(self) -> L.LightningModule:
        return TimeFirstModule()

    def loaders(self) -> tuple[Any, Any]:
        def items(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
            parts = zip(*sentences(count, seed), strict=True)
            return [(ids[:length], tags[:length]) for ids, length, tags in parts]

        def collate(samples: list[Any]) -> dict[str, Tensor]:
            tokens, tags = zip(*samples, strict=True)
            return {
                "tokens": pad_sequence(tokens, batch_first=True),
                "tags": pad_sequence(tags, batch_first=True),
            }

        return (
            DataLoader(items(192, 1), 16, shuffle=True, collate_fn=collate),
            DataLoader(items(96, 2), 16, collate_fn=collate),
        )

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["tokens"],), {}

    def targets(self, batch: Any) -> Tensor:
        return torch.where(batch["tokens"] == 0, IGNORED, batch["tags"])


class LSTMModule(Optimized):
    """(padded ids, lengths, labels) with packed sequences."""

    def __init__(self, classes: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, text: Tensor, text_lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(text), text_lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.lstm(packed)
        return self.fc(hidden[-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        text, lengths, label = batch
        return F.cross_entropy(self(text, lengths), label)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        text, lengths, label = batch
        self.log("val_loss", F.cross_entropy(self(text, lengths), label))


class PackedLSTM(Stranger):
    sizes = (512, 96, 16)

    def module(self) -> L.LightningModule:
        return LSTMModule()

    def data(self, count: int, seed: int) -> Dataset:
        ids, lengths, _ = sentences(count, seed)
        return TensorDataset(ids, lengths, topics(ids, seed))

    def sidekick(self, outputs: int) -> nn.Module:
        return LSTMModule(outputs, 8)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[0], batch[1]), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[2]


class BagModule(Optimized):
    """torchtext's news tutorial: all words of a batch in one row, with offsets."""

    def __init__(self, classes: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(30, width)
        self.fc = nn.Linear(width, classes)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.embedding(text, offsets))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        label, text, offsets = batch
        return F.cross_entropy(self(text, offsets), label)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        label, text, offsets = batch
        loss = F.cross_entropy(self(text, offsets), label)
        self.log("val_loss", loss, batch_size=len(label))


class BagOfWords(Stranger):
    """The label stands first, and the first tensor is not as long as the batch."""

    trainer: ClassVar[dict[str, Any]] = {"max_epochs": 8}

    def module(self) -> L.LightningModule:
        return BagModule()

    def loaders(self) -> tuple[Any, Any]:
        def items(count: int, seed: int) -> list[Any]:
            ids, lengths, _ = sentences(count, seed)
            parts = zip(topics(ids, seed), ids, lengths, strict=True)
            return [(label, row[:length]) for label, row, length in parts]

        def collate(samples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
            label, text = zip(*samples, strict=True)
            offsets = torch.tensor([0, *(len(t) for t in text[:-1])]).cumsum(0)
            return torch.stack(label), torch.cat(text), offsets

        return (
            DataLoader(items(192, 1), 16, shuffle=True, collate_fn=collate),
            DataLoader(items(96, 2), 16, collate_fn=collate),
        )

    def sidekick(self, outputs: int) -> nn.Module:
        return BagModule(outputs, 8)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[1], batch[2]), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[0]


class LastStepModule(Optimized):
    """A sequence of logits (N, T, K), of which the step takes the last."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x)[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, -1], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self(batch[0])
        self.log("val_loss", F.cross_entropy(out[:, -1, :], batch[1]))


class LastStep(Stranger):
    """The sidekick gives the logits of the sequence at once, (N, K)."""

    def module(self) -> L.LightningModule:
        return LastStepModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, y = points(count, seed, width=20)
        return TensorDataset(x.view(count, 5, 4), y)

    def sidekick(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(20, outputs))

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[:, -1]


class ClassTokenModule(LastStepModule):
    """A transformer with a class token in front; the head gives logits of every position."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.fc(self.mix(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, 0], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0])[:, 0], batch[1]))


class ClassToken(LastStep):
    def module(self) -> L.LightningModule:
        return ClassTokenModule()

    def data(self, count: int, seed: int) -> Dataset:
        x, _ = points(count, seed, width=20)
        x = x.view(count, 5, 4)
        # A transformer without positions sees which values there are, not where.
        return TensorDataset(x, (x + 0.4 * x.roll(1, 0)).mean(1)[:, :3].argmax(1))

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module(batch[0])[:, 0]


class PooledModule(ClassTokenModule):
    """The step pools the features of the class token and applies the head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.fc(self(batch[0])[:, 0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.fc(self(batch[0])[:, 0]), batch[1]))


class ClassTokenAndHead(ClassToken):
    takes_batch = True

    def module(self) -> L.LightningModule:
        return PooledModule()

    def logits(self, module: Any, batch: Any) -> Tensor:
        return module.fc(module(batch[0])[:, 0])


class SiameseModule(Optimized):
    """Sentence pairs: the same encoder twice, |u - v| and u * v into a classifier."""

    def __init__(self, classes: int = 2, width: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.Tanh())
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, premise: Tensor, hypothesis: Tensor) -> Tensor:
        u, v = self.encoder(premise), self.encoder(hypothesis)
        return self.classifier(torch.cat([(u - v).abs(), u * v], dim=-1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        premise, hypothesis, entails = batch
        return F.cross_entropy(self(premise, hypothesis), entails)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        premise, hypothesis, entails = batch
        self.log("val_loss", F.cross_entropy(self(premise, hypothesis), entails))


class Siamese(Stranger):
    def module(self) -> L.LightningModule:
        return SiameseModule()

    def data(self, count: int, seed: int) -> Dataset:
        (a, _), (b, _) = points(count, seed), points(count, seed + 50)
        return TensorDataset(a, b, ((a * b).sum(1) + points(count, seed + 9)[0][:, 0] > 0).long())

    def sidekick(self, outputs: int) -> nn.Module:
        return SiameseModule(outputs, 5)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[0], batch[1]), {}

    def targets(self, batch: Any) -> Tensor:
        return batch[2]
