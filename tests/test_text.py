"""Pairs of text models: the same tokens, and a call that both take."""

from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_duo.text import call_fitting, check_tokens
from lightning_duo.zoo import build_sidekick

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

IDS = torch.tensor([[2, 5, 6, 3]])
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert(vocab_size: int = 50, *, kind: str = "Bert", **config: Any) -> nn.Module:
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size, **SIZES, intermediate_size=16, **config
    )
    return getattr(transformers, f"{kind}ForSequenceClassification")(made)


def distilbert(**config: Any) -> nn.Module:
    made = transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16, **config
    )
    return transformers.DistilBertForSequenceClassification(made)


class OfText(L.LightningModule):
    """A user's module around a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = {"lr": 1e-3}
        self.model = model


def test_models_of_one_family_pass() -> None:
    assert check_tokens(OfText(bert()), bert()) == []
    assert check_tokens(OfText(bert()), distilbert()) == []


def test_models_that_state_no_vocabulary_pass() -> None:
    assert check_tokens(nn.Linear(2, 2), bert()) == []
    assert check_tokens(bert(), nn.Embedding(9, 2)) == []


def test_a_smaller_vocabulary_is_refused_and_can_be_resized() -> None:
    base, sidekick = bert(50), bert(40)
    with pytest.raises(IndexError):
        sidekick(torch.tensor([[49]]))
    with pytest.raises(ValueError, match=r"40 tokens.* 50.*resize_token_embeddings\(50\)"):
        check_tokens(OfText(base), sidekick)
    sidekick.resize_token_embeddings(50)
    assert check_tokens(OfText(base), sidekick) == []
    sidekick(torch.tensor([[49]]))


def test_a_larger_vocabulary_is_doubted() -> None:
    (told,) = check_tokens(bert(50), bert(60))
    assert "50 tokens and the sidekick's 60" in told


def test_another_family_is_doubted() -> None:
    told = check_tokens(bert(pad_token_id=1), bert(kind="Roberta", pad_token_id=1))
    assert any("a bert and the sidekick a roberta" in text for text in told)


@pytest.mark.parametrize("name", ["pad", "bos", "eos", "sep", "cls", "unk", "mask"])
def test_other_special_tokens_are_told(name: str) -> None:
    base, sidekick = bert(), bert()
    setattr(base.config, f"{name}_token_id", 4)
    setattr(sidekick.config, f"{name}_token_id", 5)
    assert check_tokens(base, sidekick) == [
        f"the base's {name}_token_id is 4 and the sidekick's is 5"
    ]


def test_fewer_positions_are_told() -> None:
    long, short = bert(max_position_embeddings=64), bert(max_position_embeddings=32)
    (told,) = check_tokens(long, short)
    assert "32 positions and the base 64" in told
    assert check_tokens(short, long) == []


def local(folder: Path, *words: str, kind: str = "Bert") -> nn.Module:
    """A model in a folder with a tokenizer, as it is loaded from there."""
    vocab = {word: number for number, word in enumerate(("[UNK]", *words))}
    model = tokenizers.models.WordLevel(vocab, unk_token="[UNK]")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    fast.save_pretrained(folder)
    bert(kind=kind, pad_token_id=0).save_pretrained(folder)
    return build_sidekick(f"transformers/{folder}", 2)


def test_tokenizers_in_local_folders_are_compared(tmp_path: Path) -> None:
    base = local(tmp_path / "base", "good", "bad")
    same = local(tmp_path / "same", "good", "bad", kind="Electra")
    other = local(tmp_path / "other", "bad", "good")
    assert check_tokens(base, same) == []
    assert check_tokens(base, other) == [
        "the tokenizers in the folders of base and sidekick differ"
    ]


def encoder_decoder(kind: str) -> nn.Module:
    made = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_labels=3
    )
    made.decoder_start_token_id = made.pad_token_id = 0
    return getattr(transformers, kind)(made)


def test_encoder_decoders_that_need_more_than_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*token ids alone"):
        check_tokens(bert(), encoder_decoder("T5ForConditionalGeneration"))
    for kind in ("T5ForSequenceClassification", "T5ForTokenClassification"):
        check_tokens(bert(), encoder_decoder(kind))


def test_looking_at_an_encoder_decoder_leaves_no_trace() -> None:
    base, sidekick = bert(), encoder_decoder("T5ForSequenceClassification").train()
    state = torch.get_rng_state()
    check_tokens(base, sidekick)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in sidekick.modules())


class OfIds(nn.Module):
    """Takes nothing but ids and a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids


class Base(nn.Module):
    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        languages: Tensor | None = None,
        lengths: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return lengths


def test_only_what_the_sidekick_does_not_take_is_left_out() -> None:
    given = UserDict(input_ids=IDS, attention_mask=IDS, token_type_ids=IDS)
    call = call_fitting(OfIds(), (), given)
    assert call.dropped == ("token_type_ids",)
    assert list(call.kwargs) == ["input_ids", "attention_mask"]
    assert list(given) == ["input_ids", "attention_mask", "token_type_ids"]
    assert OfIds()(*call.args, **call.kwargs) is IDS


def test_what_the_base_has_a_default_for_is_left_out_too() -> None:
    given = {"input_ids": IDS, "languages": IDS, "lengths": IDS}
    assert call_fitting(OfIds(), (), given, base=Base()).dropped == ("languages",)
    assert call_fitting(OfIds(), (), given).dropped == ()


def test_what_the_base_reads_is_never_left_out() -> None:
    class OfNumbers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    call = call_fitting(OfNumbers(), (IDS, IDS), {"input_ids": IDS}, base=Base())
    assert call.dropped == ()
    assert call.args == (IDS, IDS)


def test_a_forward_that_takes_all_gets_all() -> None:
    class OfAll(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return inputs["input_ids"]

    given = {"input_ids": IDS, "token_type_ids": IDS}
    assert call_fitting(OfAll(), (), given) == ((), given, ())


def test_the_batch_of_a_bert_runs_in_a_distilbert() -> None:
    batch = {"input_ids": IDS, "attention_mask": IDS, "token_type_ids": torch.zeros_like(IDS)}
    call = call_fitting(distilbert(num_labels=3), (), batch, base=bert())
    assert distilbert(num_labels=3)(**call.kwargs).logits.shape == (1, 3)


def test_configurations_of_the_users_own_are_read() -> None:
    class Own(nn.Module):
        def __init__(self, vocab_size: int) -> None:
            super().__init__()
            self.config = SimpleNamespace(vocab_size=vocab_size)

    with pytest.raises(ValueError, match="vocabulary of 8 tokens and the base one of 9"):
        check_tokens(Own(9), Own(8))
