"""Base, sidekick and duo, and any forms beside them, measured on the same samples."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_duo.evaluation.forms import LABELS, Form, check_score, duo_forms, judge
from lightning_duo.evaluation.measures import measure
from lightning_duo.evaluation.predictions import Predictions, check_items, likeliest
from lightning_duo.temperature import TemperatureFit
from lightning_duo.temperature.samples import check_samples

# What is kept of each sample and form: 24 bytes.
COLUMNS = {
    "confidence": torch.float32,
    "score": torch.float32,
    "prediction": torch.int32,
    "nll": torch.float64,
    "brier": torch.float32,
}
# What a row takes when the seven forms of a duo are judged and measured: the columns, predictions
# once more in int64, target and item, and about 64 bytes to rank one form after the other.
BYTES_OF_A_ROW = len(LABELS) * (sum(dtype.itemsize for dtype in COLUMNS.values()) + 8) + 16 + 64
ROWS = 1 << 18  # of a batch that are judged at a time, as what is said of them takes memory


def evaluate(
    base_logits: Tensor,
    sidekick_logits: Tensor,
    targets: Tensor,
    fit: TemperatureFit,
    *,
    score: str = "confidence",
    forms: Mapping[str, Form] | None = None,
    items: Tensor | None = None,
    **others: Tensor,
) -> dict[str, Predictions]:
    """What base, sidekick and duo in every form, and any forms beside them, say of these samples.

    Args:
        base_logits: Logits of the base, shape (N, K).
        sidekick_logits: Logits of the sidekick, shape (N, K).
        targets: True classes, shape (N,), or class probabilities, shape (N, K); see `judge`.
        fit: The temperatures.
        score: What ranks the samples: the "confidence", or the "entropy" (negated) of the
            probabilities. ECE is of the confidence in any case.
        forms: Name -> form, to be judged beside those of `duo_forms`.
        items: Number of the item that each row belongs to, shape (N,), where rows are pixels of an
            image, tokens of a sentence or labels of a sample. `bootstrap` then draws items.
        others: Logits of further members that these forms name, shape (N, K).

    Returns:
        Form -> predictions on the CPU, for `measure`, `bootstrap` and `report.write_report`.

    Raises:
        ValueError: If samples or items do not fit, as in `fit_temperatures`; as in `judge`; or if a
            form has the name of one of the seven.

    Example:
        >>> import torch
        >>> from lightning_duo import fit_temperatures
        >>> from lightning_duo.evaluation import mean_probability
        >>> base, second = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]] * 2)
        >>> sidekick, targets = torch.zeros(2, 2), torch.tensor([0, 1])
        >>> forms = {"ensemble": Form("2 bases", {"base": 1, "second": 1}, mean_probability)}
        >>> fit = fit_temperatures(base, sidekick, targets)
        >>> list(evaluate(base, sidekick, targets, fit, forms=forms, second=second))[-1]
        'ensemble'
    """
    check_samples(base_logits, sidekick_logits, targets)
    if taken := sorted({"base", "sidekick"} & others.keys()):
        raise ValueError(f"{taken} are given already; choose other names for further members")
    members = {"base": base_logits, "sidekick": sidekick_logits, **others}
    items = check_items(items, len(targets))
    return {
        name: replace(judge(form, members, targets, score=score), items=items).cpu()
        for name, form in _all_forms(fit, forms).items()
    }


class DuoMetrics(Metric):
    """Base, sidekick and duo in every form, and any forms beside them, on the same samples.

    Each form has every metric of `MEASURES` that applies. For ``uq_only`` nll and brier are those
    of ``duo``: both judge the probabilities, which the two share.

    Args:
        num_classes: K.
        fit: The fitted temperatures, of which `duo_forms` makes the seven forms.
        score: What ranks the samples: the "confidence", or the "entropy" (negated) of the
            probabilities. ECE is of the confidence in any case.
        forms: Name -> form, to be measured beside the seven.

    Raises:
        ValueError: If the score is unknown, or a form has the name of one of the seven.

    Example:
        >>> import torch
        >>> from lightning_duo import fit_temperatures
        >>> base, sidekick = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)
        >>> targets = torch.tensor([0, 1])
        >>> metrics = DuoMetrics(2, fit_temperatures(base, sidekick, targets))
        >>> metrics.update(base, sidekick, targets)
        >>> metrics.compute()["duo"]["accuracy"]
        0.5

    Source: Asymmetric Duos, Sec. 3.1 (ablations), Sec. 5 (metrics) and App. C (entropy).
    """

    full_state_update = False
    targets: list[Tensor]
    items: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        fit: TemperatureFit,
        *,
        score: str = "confidence",
        forms: Mapping[str, Form] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_score(score)
        self.num_classes, self.ranked_by = num_classes, score
        self.forms = _all_forms(fit, forms)
        for name in (*COLUMNS, "targets", "items"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    @override
    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process that gets no sample must still have something to exchange with the others.
        none = torch.zeros(0, len(self.forms), device=self.device)
        for name, dtype in COLUMNS.items():
            getattr(self, name).append(none.to(dtype))
        self.targets.append(none[:, 0].long())
        self.items.append(none[:, 0].long())

    @override
    def update(
        self,
        base_logits: Tensor,
        sidekick_logits: Tensor,
        targets: Tensor,
        *,
        items: Tensor | None = None,
        **others: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            base_logits: Logits of the base, shape (B, K).
            sidekick_logits: Logits of the sidekick, shape (B, K).
            targets: True classes, shape (B,), or class probabilities, shape (B, K); see `judge`.
                Batches may differ in this.
            items: Number of the item that each row belongs to, shape (B,), an integer dtype, where
                rows are pixels of an image, tokens of a sentence or labels of a sample. Each item
                of all batches and processes needs a number of its own. To be given in all batches,
                or in none; they take 8 bytes a row.
            others: Logits of further members that forms name, shape (B, K).
        """
        members = {"base": base_logits, "sidekick": sidekick_logits, **others}
        items = check_items(items, len(targets))
        rows = max(map(len, (targets, *members.values())))
        judged = [
            self._judged(
                {name: x[i : i + ROWS] for name, x in members.items()}, targets[i : i + ROWS]
            )
            for i in range(0, max(1, rows), ROWS)
        ]
        for name, parts in zip(COLUMNS, zip(*judged, strict=True), strict=True):
            getattr(self, name).extend(parts)
        self.targets.append(likeliest(targets))
        if items is not None:
            self.items.append(items)

    def _judged(self, members: Mapping[str, Tensor], targets: Tensor) -> list[Tensor]:
        """What the forms say of some rows: for each of `COLUMNS`, shape (R, F)."""
        said = [judge(form, members, targets, score=self.ranked_by) for form in self.forms.values()]
        return [
            torch.stack([getattr(one, name) for one in said], dim=1).to(dtype)
            for name, dtype in COLUMNS.items()
        ]

    @override
    def compute(self) -> dict[str, dict[str, float]]:
        """Value of every metric of every form, e.g. ``compute()["duo"]["aurc"]``."""
        return {form: measure(predictions) for form, predictions in self._by_form().items()}

    def predictions(self) -> dict[str, Predictions]:
        """What each form says of the samples of all processes, in the order of the processes."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return {form: found.cpu() for form, found in self._by_form().items()}

    def _joined(self, name: str) -> Tensor:
        """All batches of a column in one, which takes their place, so that none is there twice."""
        joined = dim_zero_cat(getattr(self, name))
        setattr(self, name, [joined])
        return joined

    def _by_form(self) -> dict[str, Predictions]:
        columns = {name: self._joined(name) for name in COLUMNS}
        columns["prediction"] = columns["prediction"].long()
        targets, items = self._joined("targets"), self._joined("items")
        if len(items) not in (0, len(targets)):
            raise ValueError(
                f"{len(items)} of {len(targets)} rows came with the number of their item; pass "
                "items= to every update of DuoMetrics, in all processes, or to none"
            )
        return {
            name: Predictions(
                **{column: values[:, i] for column, values in columns.items()},
                targets=targets,
                items=items if len(items) else None,
                num_classes=self.num_classes,
                label=form.label,
                forwards=form.forwards,
            )
            for i, (name, form) in enumerate(self.forms.items())
        }


def _all_forms(fit: TemperatureFit, forms: Mapping[str, Form] | None) -> dict[str, Form]:
    """The seven of the duo, and those beside them."""
    if taken := sorted(LABELS.keys() & (forms or {})):
        raise ValueError(f"forms of a duo are named {taken} already; choose other names")
    return duo_forms(fit) | dict(forms or {})
