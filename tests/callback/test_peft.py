"""Bases with adapters: trained beside a sidekick, or before; needs peft and transformers."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import timm
import torch
from helpers import digest, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import compare, make_duo
from strangers.data import Records, images, sentences, topics
from strangers.hugging_face import HuggingFaceModule, bert
from strangers.models import Optimized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_duo import DuoModule, add_sidekick

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


class Adapted(NamedTuple):
    """A base with an adapter."""

    head: str
    """Of the BERT; empty for a vision transformer."""
    options: dict[str, Any]
    method: str = "LoraConfig"

    def net(self) -> nn.Module:
        """The small model with its adapter, which is all that wants gradients, but for the head."""
        kind = getattr(peft, self.method)
        if not self.head:
            vit = timm.create_model(
                "vit_tiny_patch16_224", img_size=16, depth=1, embed_dim=12, num_classes=3
            )
            return peft.get_peft_model(vit, kind(**self.options))
        task = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
        return peft.get_peft_model(
            bert(self.head, 3), kind(task_type=task[self.head], **self.options)
        )

    def module(self) -> L.LightningModule:
        return HuggingFaceModule(self.net()) if self.head else Vision(self.net())

    def sidekick(self, outputs: int) -> nn.Module:
        if self.head:
            return bert(self.head, outputs, 8)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, outputs))

    def data(self, count: int, seed: int) -> Dataset:
        if not self.head:
            return Records(*images(count, seed, size=16))
        ids, _, tags = sentences(count, seed)
        if self.head == "TokenClassification":
            return Records(ids, torch.where(ids % 4 == 3, -100, tags), make=record)
        return Records(ids, topics(ids, seed), make=record)

    def loaders(self, *, shuffle: bool = False) -> tuple[DataLoader, DataLoader]:
        train = DataLoader(self.data(96, 1), 16, shuffle=shuffle)
        return train, DataLoader(self.data(64, 2), 16)

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model, of a few new samples."""
        batch = next(iter(DataLoader(self.data(8, 3), 8)))
        if not self.head:
            return (batch[0],), {}
        return (), {name: value for name, value in batch.items() if name != "labels"}

    def logits(self, net: nn.Module) -> Tensor:
        """By hand, of those samples."""
        args, kwargs = self.call()
        with torch.no_grad():
            found = net.eval()(*args, **kwargs)
        return found.logits if self.head else found


def record(ids: Tensor, label: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": label}


class Vision(Optimized):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


LORA: dict[str, Any] = {"r": 2, "lora_dropout": 0.1}
KINDS = {
    "lora": Adapted("SequenceClassification", LORA),
    "tokens": Adapted("TokenClassification", LORA),
    "saved": Adapted("SequenceClassification", {**LORA, "modules_to_save": ["pooler"]}),
    "dora": Adapted("SequenceClassification", {**LORA, "use_dora": True}),
    "vera": Adapted("SequenceClassification", {"r": 2}, "VeraConfig"),
    "ia3": Adapted("SequenceClassification", {}, "IA3Config"),
    "prompt": Adapted("SequenceClassification", {"num_virtual_tokens": 2}, "PromptTuningConfig"),
    "vision": Adapted("", {**LORA, "target_modules": ["qkv"], "modules_to_save": ["head"]}),
}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def recipe(kind: Adapted) -> dict[str, Any]:
    return {"sidekick": kind.sidekick, "optimizer": adam, "probe": 0, "summary": False}


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_trained_as_without_the_callback_and_deployed(
    name: str, tmp_path: Path
) -> None:
    kind = KINDS[name]

    found = compare(
        kind.module,
        train=lambda: kind.loaders(shuffle=True)[0],
        val=lambda: kind.loaders()[1],
        duo={"sidekick": kind.sidekick},
    )
    duo, (args, kwargs) = found.duo.module, kind.call()
    assert torch.equal(duo.base_logits(*args, **kwargs), kind.logits(found.module.model))
    said = duo(*args, **kwargs)
    assert torch.equal(copy.deepcopy(duo)(*args, **kwargs).probs, said.probs)
    duo.save(tmp_path / "duo.safetensors")
    loaded = DuoModule.load(tmp_path / "duo.safetensors", blank(duo.base), kind.sidekick(3))
    assert torch.equal(loaded(*args, **kwargs).probs, said.probs)


def blank(model: nn.Module) -> nn.Module:
    """The same architecture with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    return other


def trained(kind: Adapted) -> L.LightningModule:
    torch.manual_seed(3)
    module = kind.module()
    make_trainer(max_epochs=1).fit(module, *kind.loaders())
    return module


def everything(module: nn.Module) -> tuple[str, list[bool], list[bool]]:
    return (
        digest(module.state_dict()),
        [parameter.requires_grad for parameter in module.parameters()],
        [part.training for part in module.modules()],
    )


def check_trained(kind: Adapted, module: L.LightningModule) -> None:
    before = everything(module)
    trainer = make_trainer(max_epochs=2)
    callback = add_sidekick(module, *kind.loaders(), trainer=trainer, **recipe(kind))
    assert everything(module) == before
    args, kwargs = kind.call()
    given = callback.module.base_logits(*args, **kwargs)
    assert torch.equal(given, kind.logits(module.model))
    assert callback.cost is not None


@pytest.mark.parametrize("name", KINDS)
def test_a_base_whose_adapter_is_trained_stays_as_it_is(name: str) -> None:
    kind = KINDS[name]
    module = trained(kind)
    check_trained(kind, module)
    if name in ("lora", "vision"):
        module.requires_grad_(False)
        check_trained(kind, module)
        module.model = module.model.merge_and_unload()
        check_trained(kind, module)


def test_a_run_with_an_adapter_is_resumed_to_the_bit(tmp_path: Path) -> None:
    kind = Adapted("SequenceClassification", {"r": 2})

    def run(folder: str, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        torch.manual_seed(9)
        module = kind.module()
        for part in module.modules():  # whose random numbers Lightning does not restore
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        duo = make_duo(**recipe(kind))
        keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(duo, keep, enable_checkpointing=True, max_epochs=3)
        trainer.fit(module, *kind.loaders(), ckpt_path=ckpt_path)
        return digest(module.state_dict()), digest(duo.sidekick.state_dict()), duo.fit

    whole = run("whole")
    assert run("resumed", tmp_path / "whole" / "epoch=0.ckpt") == whole
