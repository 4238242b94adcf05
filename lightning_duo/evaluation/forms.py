"""Forms: ways to predict with one model or several, those of the paper and any other."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_duo.evaluation.predictions import Predictions, likeliest, log_losses
from lightning_duo.selective import brier_scores
from lightning_duo.temperature import UNWEIGHTED, TemperatureFit
from lightning_duo_kernels import duo_head
from lightning_duo_kernels.head import HeadOutput

CHUNK_LOGITS = 1 << 18  # that are judged at a time: in float64 they stay in the cache

# What ranks the samples, higher is surer, shape (N,): of the logits (N, K) and what the head says.
SCORES: dict[str, Callable[[Tensor, HeadOutput], Tensor]] = {
    "confidence": lambda logits, head: head.confidence,
    "entropy": lambda logits, head: -head.entropy,
}

# The forms that every duo has, in the order of tables.
LABELS = {
    "base": "base",
    "base_scaled": "scaled base",
    "sidekick": "sidekick",
    "sidekick_scaled": "scaled sidekick",
    "unweighted": "unweighted",
    "uq_only": "UQ only",
    "duo": "duo",
}


class Weighted(NamedTuple):
    """The sum of the members' logits, each times its temperature.

    `judge` computes it in one pass of `duo_head` where there are one or two members.
    """

    temperatures: tuple[float, ...]
    """One for each member, in their order; they multiply."""

    def __call__(self, *logits: Tensor) -> Tensor:
        """The sum in float64, shape (N, K); a class that any member masks with -inf is masked."""
        if len(logits) != len(self.temperatures):
            raise ValueError(f"{len(self.temperatures)} temperatures for {len(logits)} members")
        pairs = zip(self.temperatures, logits, strict=True)
        total = reduce(add, (t * member.double() for t, member in pairs))
        masked = reduce(torch.minimum, logits) == -torch.inf
        return total.masked_fill(masked, -torch.inf)


def mean_probability(*logits: Tensor) -> Tensor:
    """The mean of the members' probabilities, as a deep ensemble of any size predicts.

    Args:
        logits: Logits of each member, shape (N, K).

    Returns:
        Log-probabilities, shape (N, K).

    Example:
        >>> import torch
        >>> mean_probability(torch.tensor([[0.0, 0.0]]), torch.tensor([[-torch.inf, 0.0]])).exp()
        tensor([[0.2500, 0.7500]])

    Source: Lakshminarayanan, Pritzel and Blundell (2017).
    """
    return torch.stack([x.log_softmax(1) for x in logits]).logsumexp(0) - math.log(len(logits))


@dataclass(frozen=True)
class Form:
    """A way to predict with one model or several: its members, and how their logits are mixed.

    Example:
        >>> Form("3 bases", {"base": 1, "second": 1, "third": 1}, mean_probability).label
        '3 bases'

    Source: Asymmetric Duos, Sec. 5 (what a duo is compared with).
    """

    label: str
    """What tables and figures call it."""
    forwards: Mapping[str, float]
    """Member -> how often it runs for a sample: the form's cost, in forwards of each member."""
    mix: Weighted | Callable[..., Tensor]
    """Members' logits (N, K), in the order of ``forwards``, to logits or log-probabilities (N, K):
    a `Weighted` sum, `mean_probability`, or any function."""
    predicts: str | None = None
    """A member that predicts instead; the mix then only says how sure that prediction is."""


def duo_forms(fit: TemperatureFit) -> dict[str, Form]:
    """The seven forms of a duo: name -> form, all of them weighted sums of logits.

    ``base``, ``sidekick`` as they are; ``base_scaled``, ``sidekick_scaled`` with the temperature
    that is best for this model alone; ``unweighted`` with temperatures (0.5, 0.5); ``duo`` with the
    fitted ones; ``uq_only`` with these too, but predicting with the base alone.

    Args:
        fit: The fitted temperatures.

    Example:
        >>> import torch
        >>> from lightning_duo import fit_temperatures
        >>> fit = fit_temperatures(torch.eye(3), torch.zeros(3, 3), torch.tensor([0, 1, 1]))
        >>> duo_forms(fit)["uq_only"].predicts
        'base'

    Source: Asymmetric Duos, Sec. 3.1 (ablations).
    """
    base, sidekick = {"base": 1.0}, {"sidekick": 1.0}
    both = base | sidekick
    weights: dict[str, tuple[dict[str, float], tuple[float, ...]]] = {
        "base": (base, (1.0,)),
        "base_scaled": (base, (fit.scaled_base.base,)),
        "sidekick": (sidekick, (1.0,)),
        "sidekick_scaled": (sidekick, (fit.scaled_sidekick.sidekick,)),
        "unweighted": (both, UNWEIGHTED),
        "uq_only": (both, fit.temperatures),
        "duo": (both, fit.temperatures),
    }
    return {
        name: Form(
            LABELS[name], members, Weighted(each), predicts="base" if name == "uq_only" else None
        )
        for name, (members, each) in weights.items()
    }


def single_forms() -> dict[str, Form]:
    """The two of `duo_forms` that no fit is needed for: ``base`` and ``sidekick`` as they are."""
    return {
        name: Form(LABELS[name], {name: 1.0}, Weighted((1.0,))) for name in ("base", "sidekick")
    }


def judge(
    form: Form, members: Mapping[str, Tensor], targets: Tensor, *, score: str = "confidence"
) -> Predictions:
    """What a form says of some samples.

    Args:
        form: The form.
        members: Model -> its logits, shape (N, K), any floating dtype; with those that the form
            names.
        targets: True classes, shape (N,); or class probabilities, shape (N, K), a floating dtype.
            Soft targets are what NLL and Brier score judge by; right is a prediction of the
            likeliest class.
        score: What ranks the samples: a key of `SCORES`.

    Returns:
        Predictions on the device of the logits, in float32, with NLL in float64.

    Raises:
        ValueError: If a member is missing, shapes do not fit, the score is unknown, or a row has no
            softmax.

    Example:
        >>> import torch
        >>> logits = {"base": torch.tensor([[2.0, 0.0]]), "second": torch.tensor([[0.0, 2.0]])}
        >>> both = Form("2 bases", {"base": 1, "second": 1}, mean_probability)
        >>> judge(both, logits, torch.tensor([1])).confidence
        tensor([0.5000])
    """
    check_score(score)
    if not form.forwards:
        raise ValueError(f"the form {form.label!r} has no members; name them in forwards")
    names = {*form.forwards, *([form.predicts] if form.predicts else [])}
    if missing := sorted(names - set(members)):
        raise ValueError(
            f"the form {form.label!r} needs logits of {missing}; there are those of "
            f"{sorted(members)}"
        )
    shapes = {tuple(members[name].shape) for name in names}
    shape = shapes.pop()
    soft = targets.ndim == 2 and targets.is_floating_point()
    if shapes or len(shape) != 2 or targets.shape != shape[: 1 + soft]:
        raise ValueError(
            f"the form {form.label!r} needs logits of one shape (N, K) and targets (N,), or class "
            f"probabilities (N, K), got {sorted({shape, *shapes})} and {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    size = max(1, CHUNK_LOGITS // max(1, shape[1]))
    parts = {name: torch.split(members[name], size) for name in names}
    said = [
        _said(form, {name: _single(part[i]) for name, part in parts.items()}, some, score)
        for i, some in enumerate(torch.split(targets, size))
    ]
    confidence, ranked, prediction, nll, brier = map(torch.cat, zip(*said, strict=True))
    columns = (confidence, ranked, prediction, likeliest(targets), nll, brier)
    return Predictions(*columns, shape[1], form.label, form.forwards)


def check_score(score: str) -> None:
    """Raise ValueError if no score has this name."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {tuple(SCORES)}, got {score!r}")


def _said(
    form: Form, members: Mapping[str, Tensor], targets: Tensor, score: str
) -> tuple[Tensor, ...]:
    """Confidence, score, prediction, nll and brier of a few rows."""
    rows = [members[name] for name in form.forwards]
    logits = form.mix(*rows)
    if logits.shape != rows[0].shape:
        raise ValueError(
            f"the form {form.label!r} mixes logits {tuple(rows[0].shape)} to "
            f"{tuple(logits.shape)}; its mix must return one value for each row and class"
        )
    mix, first = form.mix, next(iter(form.forwards))
    if isinstance(mix, Weighted) and len(rows) <= 2 and form.predicts in (None, first):
        pair, weights = (rows[0], rows[-1]), (*mix.temperatures, 0.0)[:2]
    else:
        mixed = _single(logits)
        pair = (mixed if form.predicts is None else members[form.predicts], mixed)
        weights = (0.0, 1.0)
    temperatures = torch.tensor(weights, dtype=torch.float32, device=logits.device)
    head = duo_head(*pair, temperatures, uq_only=form.predicts is not None)
    assert head.probs is not None
    if nan := int(head.confidence.isnan().sum()):
        raise ValueError(f"{nan} of {len(targets)} rows of the form {form.label!r} hold NaN or inf")
    brier = brier_scores(head.probs, targets).float()
    return (
        head.confidence,
        SCORES[score](logits, head).float(),
        head.prediction,
        # In float64, so that it orders two models as the fit does.
        log_losses(logits.double().log_softmax(1), targets),
        brier,
    )


def _single(logits: Tensor) -> Tensor:
    """In float32; of float64 logits, whose size may hide their differences, below their largest."""
    if logits.dtype == torch.float64 and logits.numel():
        logits = logits - logits.amax(dim=1, keepdim=True)
    return logits.float()
