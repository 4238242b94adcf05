"""What one model, or several together, say of some samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_duo.selective import brier_scores
from lightning_duo.selective.calibration import distributions


@dataclass(frozen=True)
class Predictions:
    """What a model says of N samples, without the (N, K) probabilities."""

    confidence: Tensor
    """Probability that the prediction is right, shape (N,)."""
    score: Tensor
    """What ranks the samples, higher is surer, shape (N,): the confidence, or minus entropy."""
    prediction: Tensor
    """Predicted class, shape (N,), int64."""
    targets: Tensor
    """True class, shape (N,), int64; of a soft target its likeliest class, the first among equal
    ones."""
    nll: Tensor
    """Negative log-likelihood of the target in nats, shape (N,), float64; the mean of it under a
    soft target."""
    brier: Tensor
    """Squared error of the probabilities, summed over classes, shape (N,)."""
    num_classes: int
    """K."""
    label: str = ""
    """What tables and figures call the model; where it is empty, they take its key."""
    forwards: Mapping[str, float] = field(default_factory=dict)
    """Model -> how often it runs for a sample, as in ``{"base": 1, "sidekick": 1}``; empty if it is
    not known."""
    items: Tensor | None = None
    """Number of the item (image, sentence, sample) that each decision belongs to, shape (N,),
    int64; None where each is one of its own."""

    def several_of_an_item(self) -> Tensor | None:
        """Items numbered from 0, where any of them has several decisions; else None.

        Returns:
            The item of each decision, shape (N,), int64.
        """
        if self.items is None:
            return None
        found, index = torch.unique(self.items, return_inverse=True)
        return None if len(found) == len(index) else index

    @classmethod
    def of(
        cls,
        probs: Tensor,
        targets: Tensor,
        *,
        prediction: Tensor | None = None,
        confidence: Tensor | None = None,
        score: Tensor | None = None,
        label: str = "",
        forwards: Mapping[str, float] | None = None,
        items: Tensor | None = None,
    ) -> "Predictions":
        """Of the probabilities of any model, from any library.

        Args:
            probs: Class probabilities, shape (N, K), rows that sum to 1.
            targets: True classes, shape (N,), an integer dtype; or class probabilities, shape
                (N, K), a floating dtype. Soft targets are what NLL and Brier score judge by; right
                is a prediction of the likeliest class.
            prediction: Predicted classes, shape (N,); by default the most probable ones.
            confidence: Probability that each prediction is right, shape (N,), in [0, 1]; by default
                the probability of the predicted class.
            score: What ranks the samples, higher is surer, shape (N,); by default the confidence.
            label: What tables and figures call the model.
            forwards: Model -> how often it runs for a sample, for the cost in a report.
            items: Number of the item that each row belongs to, shape (N,), an integer dtype, where
                rows are pixels of an image, tokens of a sentence or labels of a sample.

        Returns:
            Predictions for `measure`, `bootstrap` and `report.write_report`.

        Raises:
            ValueError: If the shapes do not fit, rows of ``probs`` or of soft targets are no
                probabilities, or targets are out of range.

        Example:
            >>> import torch
            >>> found = Predictions.of(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
            >>> found.confidence, found.correct
            (tensor([0.9000, 0.6000]), tensor([ True, False]))
        """
        items = check_items(items, len(targets))
        brier = brier_scores(probs, targets).to(probs.dtype)
        nll = log_losses(probs.double().log(), targets)
        targets = likeliest(targets)
        prediction = probs.argmax(1) if prediction is None else prediction.long()
        if confidence is None:
            confidence = probs.gather(1, prediction[:, None]).squeeze(1)
        score = confidence if score is None else score
        given = {"prediction": prediction, "confidence": confidence, "score": score}
        for name, column in given.items():
            if column.shape != targets.shape:
                raise ValueError(
                    f"expected {name} of shape ({len(targets)},), got {tuple(column.shape)}"
                )
        columns = (confidence, score, prediction, targets, nll, brier)
        return cls(*columns, probs.shape[1], label, forwards or {}, items)

    @property
    def correct(self) -> Tensor:
        """Whether each prediction is right, shape (N,), bool."""
        return self.prediction == self.targets

    def cpu(self) -> "Predictions":
        """The same on the CPU."""
        columns: dict[str, Any] = {k: v.cpu() for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **columns)


def check_items(items: Tensor | None, rows: int) -> Tensor | None:
    """The numbers of the items that so many rows belong to, int64; None if there are none.

    Raises:
        ValueError: If they are no whole numbers, or not one for each row.
    """
    if items is None:
        return None
    number = not (items.is_floating_point() or items.is_complex() or items.dtype == torch.bool)
    if items.shape != (rows,) or not number:
        raise ValueError(
            f"items must hold the number of each row's item, an integer dtype and shape ({rows},); "
            f"got {items.dtype} of shape {tuple(items.shape)}"
        )
    return items.long()


def likeliest(targets: Tensor) -> Tensor:
    """The classes that targets say are true, shape (N,), int64.

    Args:
        targets: Classes, shape (N,), or class probabilities, shape (N, K); the first of equal ones
            counts.
    """
    return targets.argmax(1) if targets.ndim == 2 else targets.long()


def log_losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, shape (N,).

    Args:
        log_probs: Log-probabilities, shape (N, K), -inf where a class cannot be.
        targets: Classes, shape (N,), or class probabilities, shape (N, K).
    """
    if targets.ndim == 1:
        return -log_probs.gather(1, targets.long()[:, None]).squeeze(1)
    q = distributions(targets)
    return -(q * log_probs).masked_fill(q == 0, 0.0).sum(1)
