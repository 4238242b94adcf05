"""`lightning-duo bench`: what a duo of two models costs on this machine."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_duo.cli.options import (
    build_model,
    check_numbers,
    check_outputs,
    is_function,
    parse_size,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

# Torch is imported where it is used: --help should not wait for it.


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
            into memory and, on a CPU, the duo's takes a second, as estimated from small batches.
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

    from lightning_duo.cost import (
        compare_counters,
        environment,
        free_memory,
        largest_batch_of_pair,
        measure_throughput,
        overhead_text,
        throughput_table,
    )

    check_numbers(
        {
            "--classes": (classes, 2),
            "--batch": (batch, 1),
            "--threads": (threads, 1),
            "--repeats": (repeats, 3),
        }
    )
    if threads is not None and threads > (cores := os.cpu_count() or 1):
        raise ValueError(f"--threads must be at most the number of cores, {cores}, got {threads}")
    check_outputs({"--output": (output, ".jsonl")})
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if threads is not None:
        torch.set_num_threads(threads)
    first, second, sample = _pair_to_measure(base, sidekick, input_size, classes, where, dtype)
    if batch and where == "cpu" and batch * sample.nbytes > (free := free_memory()):
        raise ValueError(
            f"--batch {batch}: such a batch of {_shape_text(sample)} takes "
            f"{batch * sample.nbytes / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free; pass "
            "fewer samples"
        )
    counted = compare_counters(first, second, sample)
    limit = "as asked"
    if batch is None:
        batch, limit = largest_batch_of_pair(first, second, sample)
    progress = Console(stderr=True)
    with progress.status("measuring") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, on what they do with the models' parts
        rows = measure_throughput(
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
    problem: OSError | None = None
    if output is not None:
        size = list(sample.shape[1:])
        pair = {"base": base, "sidekick": sidekick, "input_size": size, "dtype": dtype}
        lines = [json.dumps({**pair, **row, **counted}) + "\n" for row in rows]
        try:
            Path(output).write_text("".join(lines))
        except OSError as error:  # the table must not be lost with the file
            problem = error
    machine = environment(where)
    turns = min(row["readings"] for row in rows if "readings" in row)
    # A file or a pipe has no width of its own, and digits must not be cut.
    Console(width=None if sys.stdout.isatty() else 140).print(
        throughput_table(rows, f"{base} + {sidekick}, {_shape_text(sample)}, {dtype}"),
        *overhead_text(rows, counted),
        f"Batch {batch}: {limit}; --batch sets another. {machine['hardware']}, threads: "
        f"{machine['threads']}, PyTorch {machine['torch']}.",
        f"Time / base is measured in each of {turns} turns or more; shown are the median and the "
        "20 % and 80 % quantiles. Do not divide times or throughputs: each is a median of its own "
        "and drifts with the load of the machine. Compiled variants are compared with the "
        "compiled base, the AOTInductor duo too. Its calls cost less than those of torch.compile, "
        "and the base would gain by that too.",
        sep="\n",
        highlight=False,
        markup=False,  # what compilers say may look like it
    )
    if problem is not None:
        raise ValueError(f"--output {output} cannot be written: {problem}") from problem
    if output is not None:
        print(f"wrote {output}")


def _pair_to_measure(
    base: str, sidekick: str, input_size: str | None, classes: int, device: str, dtype: str
) -> "tuple[nn.Module, nn.Module, Tensor]":
    """Base and sidekick with random weights, and a sample of batch one."""
    import torch

    from lightning_duo.zoo import input_size as stated_size

    precision = getattr(torch, dtype)
    first = build_model("base", base, classes)
    second = build_model("sidekick", sidekick, classes)
    size: tuple[int, ...] | None = None
    if input_size:
        size = tuple(parse_size(input_size))
    elif not is_function(base):
        size = stated_size(base, first)
    if size is None:
        raise ValueError(
            f"{base} does not state the size of its inputs; pass --input_size 3x224x224"
        )
    sample = torch.randn(1, *size, dtype=precision, device=device)
    one = _classes(f"base {base}", first, sample)
    other = _classes(f"sidekick {sidekick}", second, sample)
    if one != other:
        raise ValueError(
            f"the base {base} has {one} classes and the sidekick {sidekick} {other}; a duo needs "
            "models of the same classes"
        )
    return first, second, sample


def _classes(name: str, model: "nn.Module", sample: "Tensor") -> int:
    """Move a model to where it is measured, and find its number of classes.

    Whatever keeps it from running one sample or two is an error that names it.
    """
    import torch

    from lightning_duo.base import as_logits
    from lightning_duo.batch import describe

    dtype = str(sample.dtype).removeprefix("torch.")
    classes = 0
    for batch in (1, 2):
        inputs = sample.expand(batch, *sample.shape[1:]).contiguous()
        try:
            model.eval().to(sample.device, sample.dtype)
            with torch.no_grad():
                output = model(inputs)
        except Exception as error:  # whatever a model may raise
            raise ValueError(
                f"the {name} cannot run a batch of {batch} of random {dtype} numbers of size "
                f"{_shape_text(sample)}: {type(error).__name__}: {str(error).rstrip('.!')}. It was "
                "called as model(batch). If it needs another size, pass --input_size or put it "
                "behind a transform; if it needs other inputs, pass a function that wraps it"
            ) from error
        logits = as_logits(output)
        if logits is None or len(logits) != batch or logits.shape[1] < 2:
            raise ValueError(
                f"the {name} must return logits of shape ({batch}, K), K >= 2, for a batch of "
                f"{batch}, as a tensor or under 'logits'; it returned {describe(output)}"
            )
        classes = logits.shape[1]
    return classes


def _shape_text(sample: "Tensor") -> str:
    return "x".join(map(str, sample.shape[1:]))
