"""`lightning-duo ...`: calibrate, report and export without writing Python."""

import json
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import auto_cli

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    _check_outputs({"--output": (output, ".json"), "--report": (report, ".html")}, resamples)
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

    _check_outputs({"--output": (output, ".html")}, resamples)
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
    nll = _show(predictions, found, f"the {len(logits.targets)} samples of {targets}", cost)
    same = len(logits.targets) == found.samples and abs(nll - found.fit.nll) < 1e-9
    if same:
        warnings.warn(
            f"these are the samples that {temperatures} was fitted on; judge a duo on others",
            stacklevel=2,
        )
    _report(output, predictions, found, targets, held_out=not same, cost=cost, resamples=resamples)


def _check_outputs(outputs: dict[str, tuple[str | None, str]], resamples: int | None) -> None:
    """What is to be written is checked before anything is read and computed."""
    from lightning_duo.figures import check_matplotlib

    if resamples is not None and resamples < 2:
        raise ValueError(f"--resamples is a number of at least 2, got {resamples}")
    for option, (path, suffix) in outputs.items():
        if path is None:
            continue
        if Path(path).suffix != suffix:
            raise ValueError(f"{option} is named *{suffix}, got {path}")
        if suffix == ".html":
            check_matplotlib()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{option} {path} cannot be written: {error}") from error


def _cost(
    base: str | None, sidekick: str | None, input_size: str | None, classes: int
) -> "Cost | None":
    given = (base, sidekick, input_size)
    if given == (None, None, None):
        return None
    if base is None or sidekick is None or input_size is None:
        raise ValueError(
            "the cost needs all of --base_model, --sidekick_model and --input_size, or none"
        )
    import torch

    from lightning_duo.cost import measure_cost
    from lightning_duo.zoo import build_sidekick

    first, second = (
        _call(part, spec) if ":" in spec else build_sidekick(spec, classes, pretrained=False)
        for part, spec in (("base_model", base), ("sidekick_model", sidekick))
    )
    try:
        return measure_cost(first, second, torch.zeros(1, *_sizes(input_size)))
    except RuntimeError as error:
        raise ValueError(
            f"{base} and {sidekick} cannot run a sample of --input_size {input_size}: {error}"
        ) from error


def _show(
    predictions: "dict[str, Predictions]", found: "Calibration", data: str, cost: "Cost | None"
) -> float:
    """Print what the duo reaches; returns its NLL."""
    from lightning_duo.evaluation import measure, measure_accepted
    from lightning_duo.summary import print_summary

    results = {form: measure(predicted) for form, predicted in predictions.items()}
    if found.threshold is not None:
        results["duo"] |= measure_accepted(predictions["duo"], found.threshold)
    print_summary(results, found, data=data, balance=None if cost is None else cost.balance)
    return results["duo"]["nll"]


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


def export(
    duo: str,
    output: str,
    *,
    base: str,
    sidekick: str,
    input_size: str,
    format: Literal["program", "aoti", "onnx"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
) -> None:
    """Turn a saved duo into one file that runs without this library.

    Args:
        duo: File written by DuoModule.save.
        output: File to write, *.pt2 or *.onnx; it maps a batch of any size to probabilities,
            prediction, confidence and whether to accept it.
        base: What builds the base, since a saved duo holds weights but no code: a timm name
            (resnet34), torchvision/NAME, or MODULE:FUNCTION, a class or function of a Python file
            that gives the model when called without arguments (my_models:Classifier).
        sidekick: What builds the sidekick, likewise; behind a transform it is a function that gives
            nn.Sequential(transform, model).
        input_size: Size of one sample, such as 3x224x224.
        format: program (torch.export), aoti (compiled by AOTInductor for this machine's kind of
            processor) or onnx. By default onnx for *.onnx, else program.
        dtype: Precision of weights and inputs.
        device: Device that the file is to run on.
    """
    import torch

    from lightning_duo.export import export_duo
    from lightning_duo.module import DuoModule

    sizes = _sizes(input_size)
    models = [_build(part, spec, duo) for part, spec in (("base", base), ("sidekick", sidekick))]
    module = DuoModule.load(duo, *models).to(device, getattr(torch, dtype))
    example = torch.zeros(2, *sizes, device=device, dtype=getattr(torch, dtype))
    chosen = format or ("onnx" if Path(output).suffix == ".onnx" else "program")
    path = export_duo(module, output, example, format=chosen)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, {chosen})")


def bench(
    *,
    base: str,
    sidekick: str,
    input_size: str | None = None,
    classes: int = 1000,
    batch: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    repeats: int = 15,
    compiled: bool = True,
    output: str | None = None,
) -> None:
    """Measure what a duo of two models costs on this machine, in minutes.

    Throughput and latency of the base, the sidekick, their duo, and the ensemble of two bases that
    one would run without a sidekick; as they are, compiled and exported, all in turns, so that the
    ratios hold on a busy machine. Models given by name have random weights, which does not matter
    for speed. What a duo gains is measured by `lightning-duo calibrate` and `report`.

    Args:
        base: The large model: a timm name (convnext_base), torchvision/NAME, or MODULE:FUNCTION,
            which gives the model when called without arguments.
        sidekick: The small model, likewise; behind a transform it is a function that gives
            nn.Sequential(transform, model).
        input_size: Size of one sample, such as 3x224x224; by default the one the base states.
        classes: Number of classes of models given by name.
        batch: Samples in a batch for the throughput; by default 128, halved until a forward fits
            into memory and, on a CPU, the duo's takes a second, as estimated from one sample.
            Latency is that of one sample.
        dtype: Precision of weights and inputs.
        device: Where to measure; auto is CUDA if there is a GPU.
        threads: Threads that PyTorch may use; as many as it takes by itself if omitted.
        repeats: Turns of each measurement, at least 3; fewer where a minute would not do for them.
        compiled: Also measure under torch.compile and AOTInductor, which takes minutes and needs a
            C++ compiler.
        output: File to write, *.jsonl: a JSON object a line with every figure, its spread and the
            machine.
    """
    import torch
    from rich.console import Console

    from lightning_duo import throughput
    from lightning_duo.timing import environment

    numbers = {"classes": (classes, 1), "batch": (batch, 1), "threads": (threads, 1)}
    for option, (value, least) in {**numbers, "repeats": (repeats, 3)}.items():
        if value is not None and value < least:
            raise ValueError(f"--{option} is a number of at least {least}, got {value}")
    _check_outputs({"--output": (output, ".jsonl")}, None)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if threads is not None:
        torch.set_num_threads(threads)
    first, second, sample = _pair_to_measure(base, sidekick, input_size, classes, where, dtype)
    counted = throughput.costs(first, second, sample)
    limit = "as asked"
    if batch is None:
        batch, limit = throughput.largest_batch_of_pair(first, second, sample)
    progress = Console(stderr=True)
    with progress.status("measuring") as status:
        rows = throughput.measure_throughput(
            first,
            second,
            sample,
            sorted({1, batch}),
            compiled=compiled,
            exported=("program", "aoti") if compiled else ("program",),
            repeats=repeats,
            budget=60,
            say=status.update if progress.is_terminal else progress.print,
        )
    if output is not None:
        size = list(sample.shape[1:])
        pair = {"base": base, "sidekick": sidekick, "input_size": size, "dtype": dtype}
        lines = [json.dumps({**pair, **row, **counted}) + "\n" for row in rows]
        Path(output).write_text("".join(lines))
    machine = environment(where)
    turns = min(row["readings"] for row in rows if "readings" in row)
    # A file or a pipe has no width of its own, and digits must not be cut.
    Console(width=None if sys.stdout.isatty() else 140).print(
        throughput.throughput_table(rows, f"{base} + {sidekick}, {_shape_text(sample)}, {dtype}"),
        *throughput.overhead_text(rows, counted),
        f"Batch {batch}: {limit}; --batch sets another. {machine['hardware']}, threads: "
        f"{machine['threads']}, PyTorch {machine['torch']}.",
        f"Time / base is taken in each of {turns} turns or more: median, and 20 % - 80 %. Times "
        "and throughputs are medians of their own and drift with what else runs: do not divide "
        "them. "
        "What is compiled is set against the compiled base.",
        sep="\n",
        highlight=False,
        markup=False,  # what compilers say may look like it
    )
    if output is not None:
        print(f"wrote {output}")


def _pair_to_measure(
    base: str, sidekick: str, input_size: str | None, classes: int, device: str, dtype: str
) -> "tuple[nn.Module, nn.Module, Tensor]":
    """Base and sidekick with random weights, and a sample of batch one."""
    import torch

    from lightning_duo import zoo
    from lightning_duo.base import as_logits

    precision = getattr(torch, dtype)
    first, second = (
        _call(part, spec) if ":" in spec else zoo.build_sidekick(spec, classes, pretrained=False)
        for part, spec in (("base", base), ("sidekick", sidekick))
    )
    size: tuple[int, ...] | None = None
    if input_size:
        size = tuple(_sizes(input_size))
    elif ":" not in base:
        size = zoo.input_size(base, first)
    if size is None:
        raise ValueError(
            f"{base} does not state the size of its inputs; pass --input_size 3x224x224"
        )
    sample = torch.randn(1, *size, dtype=precision, device=device)
    first, second = (model.eval().to(device, precision) for model in (first, second))
    shapes = []
    for part, spec, model in (("base", base, first), ("sidekick", sidekick, second)):
        try:
            with torch.no_grad():
                logits = as_logits(model(sample))
        except Exception as error:  # whatever a model may raise
            raise ValueError(
                f"the {part} {spec} cannot run a sample of {_shape_text(sample)} in {dtype}: "
                f"{str(error).rstrip('.')}. If it takes another size, pass that as --input_size, "
                "or a sidekick behind a transform"
            ) from error
        if logits is None:
            raise ValueError(f"the {part} {spec} does not return logits of shape (N, classes)")
        shapes.append(tuple(logits.shape))
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"logits of the base {base} have shape {shapes[0]}, those of the sidekick {sidekick} "
            f"{shapes[1]}; a duo needs models of the same classes"
        )
    return first, second, sample


def _shape_text(sample: "Tensor") -> str:
    return "x".join(map(str, sample.shape[1:]))


def _sizes(text: str) -> list[int]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--input_size is the size of one sample, such as 3x224x224; got {text}")
    return [int(size) for size in sizes]


def _build(part: str, spec: str, duo: str) -> "nn.Module":
    """Build the base or sidekick that ``spec`` names, with as many classes as the file has."""
    if ":" in spec:
        return _call(part, spec)
    from lightning_duo.module import read_header
    from lightning_duo.zoo import build_sidekick, head_parameters

    _, shapes = read_header(duo)
    # The head's last parameter, its bias if it has one, begins with the classes.
    name, _ = head_parameters(build_sidekick(spec, 2, pretrained=False), 2)[-1]
    if f"{part}.{name}" not in shapes:
        raise ValueError(
            f"the {part} in {duo} is not a {spec} alone ({part}.{name} is missing); pass --{part} "
            "MODULE:FUNCTION, a function that builds it as it was, such as "
            "nn.Sequential(transform, model)"
        )
    classes = shapes[f"{part}.{name}"][0]
    return build_sidekick(spec, classes, pretrained=False)


def _call(part: str, spec: str) -> "nn.Module":
    """The model that MODULE:FUNCTION gives; whatever goes wrong in the user's code is named."""
    from torch import nn

    module, function = spec.split(":", 1)
    if not all(name.isidentifier() for name in (*module.split("."), function)):
        raise ValueError(
            f"--{part} {spec}: MODULE:FUNCTION is written as in Python, such as "
            "my_models:Classifier for class Classifier of my_models.py"
        )
    try:
        build = getattr(import_module(module), function)
    except Exception as error:
        raise ValueError(
            f"--{part} {spec} cannot be imported: {type(error).__name__}: {error}; name a class or "
            "function of a Python file here or of an installed package"
        ) from error
    try:
        model = build()
    except Exception as error:
        raise ValueError(
            f"--{part} {spec}, called without arguments, fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--{part} {spec} must give an nn.Module, got {type(model).__name__}")
    return model


def _say(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Warnings of this library as a line for a user; others, of its dependencies, not at all."""
    if category is UserWarning:
        print(f"lightning-duo: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    warnings.showwarning = _say  # type: ignore[assignment]
    sys.path.insert(0, os.getcwd())  # as `python -m` does, for MODULE:FUNCTION
    try:
        auto_cli(
            {"calibrate": calibrate, "report": report, "export": export, "bench": bench},
            as_positional=True,
            prog="lightning-duo",
            description=(
                "A duo is a large classifier (base) and a much smaller one (sidekick) whose logits "
                "are added with two fitted weights, for a more honest confidence. calibrate: make "
                "a duo of two trained models. report: judge it on test data. export: turn a saved "
                "duo into one file to deploy. bench: measure what a duo of two models costs here. "
                "'lightning-duo COMMAND --help' says more."
            ),
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise SystemExit(f"lightning-duo: {error}") from error


if __name__ == "__main__":
    main()
