"""Pairs of text models: whether both read the same tokens, and a call that the sidekick takes."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_duo.batch import arguments_of
from lightning_duo.isolation import evaluating, own_stream

SPECIAL = ("pad", "bos", "cls", "eos", "sep", "unk", "mask")
# Model type -> the one whose vocabulary its published models have taken.
TAKEN_FROM = {
    "distilbert": "bert",
    "electra": "bert",
    "mobilebert": "bert",
    "bart": "roberta",
    "longformer": "roberta",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
# What classifiers of transformers can do without, or work out for themselves.
OPTIONAL = frozenset(
    (
        "attention_mask",
        "cache_position",
        "head_mask",
        "labels",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    )
)


class Call(NamedTuple):
    """A call that a model takes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dropped: tuple[str, ...]
    """Names of the keyword arguments that are left out."""


def call_fitting(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    base: nn.Module | None = None,
) -> Call:
    """The base's call, without optional keyword arguments that the model's forward does not take.

    Optional are those with a default in the base's own forward, and those that models of
    transformers usually can do without. Others stay, so that the model itself refuses them.

    Args:
        model: The sidekick.
        args: Positional arguments of the base's call; all stay.
        kwargs: Its keyword arguments.
        base: The base, or the part of it that was called so.

    Example:
        >>> class OfIds(nn.Module):
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return input_ids
        >>> call_fitting(OfIds(), (), {"input_ids": 0, "attention_mask": 1, "token_type_ids": 2})
        Call(args=(), kwargs={'input_ids': 0, 'attention_mask': 1}, dropped=('token_type_ids',))
    """
    taken = arguments_of(model)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return Call(args, dict(kwargs), ())
    given = {} if base is None else arguments_of(base)
    defaults = {key for key, p in given.items() if p.default is not inspect.Parameter.empty}
    # Models of transformers declare even their inputs as optional.
    optional = OPTIONAL | defaults - {getattr(base, "main_input_name", None)}
    dropped = tuple(key for key in kwargs if key in optional and key not in taken)
    return Call(args, {key: kwargs[key] for key in kwargs if key not in dropped}, dropped)


def check_tokens(base: nn.Module, sidekick: nn.Module) -> list[str]:
    """Find out whether a sidekick reads the token ids that the base is given.

    Compared is what the configurations of both state, in the manner of transformers; and the
    tokenizers, where both models come from local folders that hold them.

    Args:
        base: The base; it, or a module in it, has a ``config`` with a ``vocab_size``.
        sidekick: The sidekick, likewise.

    Returns:
        What may be wrong with the pair, one sentence each; nothing if either model states nothing.

    Raises:
        ValueError: If the sidekick has fewer tokens than the base, or does not run on ids alone.

    Example:
        >>> from types import SimpleNamespace
        >>> base, sidekick = nn.Identity(), nn.Identity()
        >>> base.config = SimpleNamespace(vocab_size=9, pad_token_id=0)
        >>> sidekick.config = SimpleNamespace(vocab_size=9, pad_token_id=1)
        >>> check_tokens(base, sidekick)
        ["the base's pad_token_id is 0 and the sidekick's is 1"]
    """
    theirs, own = _text_config(base), _text_config(sidekick)
    if own is not None:
        _check_ids_alone(sidekick, own)
    if theirs is None or own is None:
        return []
    if own.vocab_size < theirs.vocab_size:
        raise ValueError(
            f"the sidekick has a vocabulary of {own.vocab_size} tokens and the base one of "
            f"{theirs.vocab_size}, so the sidekick cannot read all of the base's token ids; take a "
            "sidekick with the base's tokenizer, or, if both have the same and only the number of "
            f"embeddings differs, call sidekick.resize_token_embeddings({theirs.vocab_size}) on a "
            "module and pass that"
        )
    return [*_about_vocabularies(theirs, own), *_about_ids(theirs, own)]


def _text_config(model: nn.Module) -> Any:
    """The first configuration in a model that states the size of a vocabulary, or None."""
    configs = (getattr(part, "config", None) for part in model.modules())
    return next((c for c in configs if isinstance(getattr(c, "vocab_size", None), int)), None)


def _check_ids_alone(sidekick: nn.Module, config: Any) -> None:
    """Refuse an encoder-decoder that wants inputs of its decoder, or labels.

    Raises:
        ValueError: If it cannot be called with token ids only.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return
    device = next((p.device for p in sidekick.parameters()), torch.device("cpu"))
    last = getattr(config, "eos_token_id", None)  # which some classifiers look for
    ids: Tensor = torch.tensor([[last if isinstance(last, int) else 0]], device=device)
    try:
        with own_stream(device), evaluating(sidekick):
            sidekick(input_ids=ids)
    except Exception as error:  # whatever a model may raise
        raise ValueError(
            f"the sidekick {type(sidekick).__name__} is an encoder-decoder that cannot be called "
            f"with token ids alone ({type(error).__name__}: {error}); take a classifier that needs "
            "neither labels nor inputs of a decoder, such as one with an encoder only"
        ) from error


def _about_vocabularies(theirs: Any, own: Any) -> list[str]:
    same = _same_tokenizer(theirs, own)
    if same is not None:
        return [] if same else ["the tokenizers in the folders of base and sidekick differ"]
    if theirs.vocab_size != own.vocab_size:
        sizes = f"{theirs.vocab_size} tokens and the sidekick's {own.vocab_size}"
        return [f"the base's vocabulary has {sizes}, so their tokenizers may differ"]
    kinds = [str(getattr(config, "model_type", "")) for config in (theirs, own)]
    if "" in kinds or len({TAKEN_FROM.get(kind, kind) for kind in kinds}) == 1:
        return []
    return [
        f"the base is a {kinds[0]} and the sidekick a {kinds[1]}: the sidekick reads the base's "
        "token ids, so both must come with the same tokenizer"
    ]


def _about_ids(theirs: Any, own: Any) -> list[str]:
    found = []
    for name in (f"{token}_token_id" for token in SPECIAL):
        one, other = getattr(theirs, name, None), getattr(own, name, None)
        if one is not None and other is not None and one != other:
            found.append(f"the base's {name} is {one} and the sidekick's is {other}")
    longest, shorter = (getattr(c, "max_position_embeddings", None) for c in (theirs, own))
    if isinstance(longest, int) and isinstance(shorter, int) and 0 < shorter < longest:
        found.append(
            f"the sidekick has {shorter} positions and the base {longest}: it cannot run longer "
            "sequences"
        )
    return found


def _same_tokenizer(*configs: Any) -> bool | None:
    """Whether the tokenizers in two local folders give the same ids; None if that is unknown."""
    folders = [Path(getattr(config, "_name_or_path", None) or "nowhere") for config in configs]
    if not all(any((folder / name).is_file() for name in TOKENIZER_FILES) for folder in folders):
        return None
    from transformers import AutoTokenizer

    try:
        one, other = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders)
    except (ImportError, OSError, ValueError):  # it needs code or packages that are not there
        return None
    return bool(one == other)
