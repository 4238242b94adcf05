"""Sidekicks for text: classifiers of transformers, from local folders."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_duo import DuoCallback
from lightning_duo.zoo import build_sidekick

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = (IDS != 0).long()
CONFIG: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def bert(num_labels: int = 3, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIG, num_labels=num_labels, **config)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS, attention_mask=MASK).logits


def test_a_local_folder_is_loaded_with_its_head(folder: Path) -> None:
    model = build_sidekick(f"transformers/{folder}", 3)
    torch.testing.assert_close(logits(model), logits(bert()))


def test_a_head_for_other_classes_starts_from_zero(folder: Path) -> None:
    model = build_sidekick(f"transformers/{folder}", 5)
    assert torch.equal(logits(model), torch.zeros(2, 5))
    theirs, own = (m.eval().bert(IDS, attention_mask=MASK)[0] for m in (bert(), model))
    torch.testing.assert_close(own, theirs)


def test_a_model_without_a_head_gets_one(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path)
    model = build_sidekick(f"transformers/{tmp_path}", 3)
    assert torch.equal(logits(model), torch.zeros(2, 3))
    nn.functional.cross_entropy(logits(model), torch.tensor([0, 1])).backward()
    assert model.classifier.weight.grad.abs().max() > 0


def test_a_classifier_of_tokens_gives_logits_for_each(folder: Path) -> None:
    model = build_sidekick(f"transformers/{folder}", 7, per_token=True)
    assert torch.equal(logits(model), torch.zeros(2, 4, 7))
    theirs, own = (m.eval().bert(IDS, attention_mask=MASK)[0] for m in (bert(), model))
    torch.testing.assert_close(own, theirs)


def test_not_pretrained_needs_the_configuration_only(tmp_path: Path) -> None:
    transformers.BertConfig(**CONFIG, num_labels=9).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"weights that save_pretrained.*pretrained=False"):
        build_sidekick(f"transformers/{tmp_path}", 3)
    model = build_sidekick(f"transformers/{tmp_path}", 3, pretrained=False)
    assert torch.equal(logits(model), torch.zeros(2, 3))


def test_a_weights_file_goes_into_the_configuration(tmp_path: Path) -> None:
    transformers.BertConfig(**CONFIG).save_pretrained(tmp_path)
    save_file(bert().state_dict(), tmp_path / "w.safetensors")
    model = build_sidekick(f"transformers/{tmp_path}", 3, weights=tmp_path / "w.safetensors")
    torch.testing.assert_close(logits(model), logits(bert()))


def test_half_precision_weights_are_trained_in_full(tmp_path: Path) -> None:
    bert().bfloat16().save_pretrained(tmp_path)
    model = build_sidekick(f"transformers/{tmp_path}", 3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_problem_of_the_folder_is_not_the_sidekicks(tmp_path: Path) -> None:
    bert(problem_type="multi_label_classification").save_pretrained(tmp_path)
    model = build_sidekick(f"transformers/{tmp_path}", 3).eval()
    assert model(IDS).loss is None
    labels = torch.tensor([0, 2])
    output = model(IDS, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))


def test_without_network_both_remedies_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    for pretrained in (True, False):
        with pytest.raises(RuntimeError, match=r"'transformers/<local folder>'.*pretrained=False"):
            build_sidekick("transformers/somebody/tiny-bert", 3, pretrained=pretrained)
        build_sidekick(f"transformers/{folder}", 3, pretrained=pretrained)


def test_names_that_cannot_be_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder '\./no/such'"):
        DuoCallback(sidekick="transformers/./no/such")
    with pytest.raises(ValueError, match="names no model"):
        DuoCallback(sidekick="transformers/")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        DuoCallback(sidekick=f"transformers/{tmp_path}")
    DuoCallback(sidekick="transformers/somebody/tiny-bert")


def test_a_model_that_classifies_no_sequences_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTConfig"):
        build_sidekick(f"transformers/{tmp_path}", 3, pretrained=False)


def test_transformers_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-duo\[text\]'"):
        DuoCallback(sidekick="transformers/somebody/tiny-bert")
