"""`lightning-duo calibrate` and `report`: a duo from the logits of two trained models."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_duo.cli.options import build_model, check_numbers, check_outputs, parse_size

if TYPE_CHECKING:
    from lightning_duo.calibration import Calibration
    from lightning_duo.cost import Cost
    from lightning_duo.evaluation import Predictions

# Torch and Lightning are imported where they are used: --help should not wait for them.


def calibrate(
    *,
    base: str,
    sidekick: str,
    targets: str,
    output: str = "temperatures.json",
    target_accuracy: float | None = None,
    delta: float | None = None,
    report: str | None = None,
    base_model: str | None = None,
    sidekick_model: str | None = None,
    input_size: str | None = None,
    resamples: int | None = None,
) -> None:
    """Make a duo of two trained models from their logits on held-out samples.

    Fits the two temperatures, prints what base, sidekick and duo reach, and writes the temperatures
    (and the threshold, if a target accuracy is given) to a file.

    Args:
        base: Logits (before softmax) of the large model on samples that trained neither model, N
            rows of K classes: .npy, .npz, .safetensors or .csv (one sample a line); of several
            arrays in a file one is named after a colon, as in val.npz:base.
        sidekick: Logits of the small model on the same samples, in the same order, likewise.
        targets: True classes of these samples, whole numbers from 0, likewise.
        output: File to write, *.json; `lightning-duo report` and Calibration.load read it.
        target_accuracy: Accuracy that accepted predictions are to reach, such as 0.95; chooses the
            confidence from which to accept.
        delta: Probability with which new data may miss the target accuracy, such as 0.05. Without
            it about half of such thresholds miss it.
        report: HTML file to write with figures and intervals, measured on the same samples.
        base_model: What the base is, to have its cost in the report: a timm name, torchvision/NAME,
            or MODULE:FUNCTION, which gives the model when called without arguments.
        sidekick_model: What the sidekick is, likewise.
        input_size: Size of one sample for these two, such as 3x224x224.
        resamples: Resamples of the bootstrap that gives the intervals of the report; by default
            1000, above 50 000 samples fewer.
    """
    from lightning_duo.calibration import calibrate_checked, check_request
    from lightning_duo.logits import read_logits

    check_request(target_accuracy, delta)
    check_numbers({"--resamples": (resamples, 2)})
    check_outputs({"--output": (output, ".json"), "--report": (report, ".html")})
    logits = read_logits(base, sidekick, targets)
    cost = _cost(base_model, sidekick_model, input_size, logits.base.shape[1])
    found, predictions = calibrate_checked(logits, target_accuracy, delta)
    _show(predictions, found, f"the {len(logits.targets)} samples of {targets}", cost)
    print(f"wrote {found.save(output)}")
    if report is not None:
        _report(report, predictions, found, targets, held_out=False, cost=cost, resamples=resamples)


def report(
    *,
    base: str,
    sidekick: str,
    targets: str,
    temperatures: str,
    output: str = "report.html",
    base_model: str | None = None,
    sidekick_model: str | None = None,
    input_size: str | None = None,
    resamples: int | None = None,
) -> None:
    """Judge a calibrated duo on test samples: a table here, and a report as one HTML file.

    Args:
        base: Logits (before softmax) of the large model on samples that fitted nothing, N rows of K
            classes: .npy, .npz, .safetensors or .csv (one sample a line); of several arrays in a
            file one is named after a colon, as in test.npz:base.
        sidekick: Logits of the small model on the same samples, in the same order, likewise.
        targets: True classes of these samples, whole numbers from 0, likewise.
        temperatures: File written by `lightning-duo calibrate` or Calibration.save; it is used as
            it is, nothing is fitted.
        output: HTML file to write; it opens offline.
        base_model: What the base is, to have its cost in the report: a timm name, torchvision/NAME,
            or MODULE:FUNCTION, which gives the model when called without arguments.
        sidekick_model: What the sidekick is, likewise.
        input_size: Size of one sample for these two, such as 3x224x224.
        resamples: Resamples of the bootstrap that gives the intervals; by default 1000, above
            50 000 samples fewer.
    """
    from lightning_duo.calibration import Calibration
    from lightning_duo.evaluation import evaluate
    from lightning_duo.logits import read_logits

    check_numbers({"--resamples": (resamples, 2)})
    check_outputs({"--output": (output, ".html")})
    found = Calibration.load(temperatures)
    logits = read_logits(base, sidekick, targets)
    classes = logits.base.shape[1]
    if classes != found.num_classes:
        raise ValueError(
            f"{temperatures} was fitted for {found.num_classes} classes, {base} has {classes}; "
            "calibrate on logits of the same models"
        )
    cost = _cost(base_model, sidekick_model, input_size, classes)
    predictions = evaluate(*logits, found.fit)
    _show(predictions, found, f"the {len(logits.targets)} samples of {targets}", cost)
    same = found.fitted_on(predictions)
    if same:
        warnings.warn(
            f"these are the samples that {temperatures} was fitted on; judge the duo on held-out "
            "samples",
            stacklevel=2,
        )
    _report(output, predictions, found, targets, held_out=not same, cost=cost, resamples=resamples)


def _cost(
    base: str | None, sidekick: str | None, input_size: str | None, classes: int
) -> "Cost | None":
    given = (base, sidekick, input_size)
    if given == (None, None, None):
        return None
    if base is None or sidekick is None or input_size is None:
        raise ValueError(
            "the cost needs all of --base_model, --sidekick_model and --input_size; pass the "
            "missing ones, or leave all three out"
        )
    import torch

    from lightning_duo.cost import measure_cost

    first = build_model("base_model", base, classes)
    second = build_model("sidekick_model", sidekick, classes)
    try:
        return measure_cost(first, second, torch.zeros(1, *parse_size(input_size)))
    except Exception as error:  # whatever a model may raise
        raise ValueError(
            f"{base} and {sidekick} cannot run a sample of --input_size {input_size}: {error}"
        ) from error


def _show(
    predictions: "dict[str, Predictions]", found: "Calibration", data: str, cost: "Cost | None"
) -> None:
    """Print what the duo reaches."""
    from lightning_duo.evaluation import measure, measure_accepted
    from lightning_duo.report import print_summary

    results = {form: measure(predicted) for form, predicted in predictions.items()}
    if found.threshold is not None:
        results["duo"] |= measure_accepted(predictions["duo"], found.threshold)
    print_summary(results, found, data=data, balance=None if cost is None else cost.balance)


def _report(
    path: str,
    predictions: "dict[str, Predictions]",
    found: "Calibration",
    targets: str,
    *,
    held_out: bool,
    cost: "Cost | None",
    resamples: int | None,
) -> None:
    from lightning_duo.report import write_report

    data = f"{len(predictions['duo'].targets)} samples of {Path(targets).name}"
    options = {"held_out": held_out, "cost": cost, "resamples": resamples}
    print(f"wrote {write_report(path, predictions, found, data=data, **options)}")  # type: ignore[arg-type]
