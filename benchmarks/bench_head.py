"""How long the duo head takes on the CPU or a GPU, beside plain PyTorch and a copy of its bytes.

    python benchmarks/bench_head.py [--repeats 20] [--threads 1] [--device cpu] [--json FILE]

All methods of one size are measured in one process, interleaved, after warm-up and compilation;
medians with 20 % and 80 % quantiles. "plain" is what one writes without this library: the weighted
sum, softmax, max and argmax, in float32, without entropy. "copy" copies as many bytes as the head
reads and writes at the least: both logits, and the probabilities.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_duo_kernels import duo_head

SIZES = ((1, 1000), (128, 10), (4096, 257), (1024, 1000), (4096, 1000), (256, 21841), (64, 151936))
DTYPES = (torch.float32, torch.bfloat16)


def plain(base: Tensor, sidekick: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, prediction and confidence, as one would write them."""
    probs = torch.softmax(t[0] * base.float() + t[1] * sidekick.float(), dim=1)
    return probs, probs.argmax(dim=1), probs.amax(dim=1)


def without_probs(base: Tensor, sidekick: Tensor, t: Tensor) -> Any:
    """The head when only prediction, confidence and entropy are wanted."""
    return duo_head(base, sidekick, t, return_probs=False)


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return statistics.median(seconds), fifths[0], fifths[3]


def measure(
    rows: int, classes: int, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Seconds of every method at one size."""
    generator = torch.Generator().manual_seed(0)
    base, sidekick = (torch.randn(rows, classes, generator=generator) * 3 for _ in range(2))
    base, sidekick = base.to(device, dtype), sidekick.to(device, dtype)
    t = torch.tensor([1.3, 0.4], device=device)
    torch._dynamo.reset()
    compiled_plain = torch.compile(plain, fullgraph=True)
    compiled = torch.compile(duo_head, fullgraph=True)
    lean = torch.compile(without_probs, fullgraph=True)
    read = 2 * base.nbytes
    source, target = (torch.ones(read // 2, dtype=torch.uint8, device=device) for _ in range(2))
    wide, wider = (torch.ones(2 * rows * classes, dtype=torch.uint8, device=device) for _ in "ab")

    def copy() -> None:
        target.copy_(source)  # reads and writes half of the logits' bytes each
        wider.copy_(wide)  # and half of the probabilities'

    methods: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(base, sidekick, t),
        "plain, compiled": lambda: compiled_plain(base, sidekick, t),
        "head": lambda: duo_head(base, sidekick, t),
        "head, compiled": lambda: compiled(base, sidekick, t),
        "head, compiled, no probs": lambda: lean(base, sidekick, t),
        "copy": copy,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    calls = max(1, 200_000 // (rows * classes))  # small sizes run several times per reading
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.inference_mode():
        for turn in range(repeats + 3):
            for name, method in methods.items():
                wait()
                start = time.perf_counter()
                for _ in range(calls):
                    method()
                wait()
                if turn >= 3:
                    seconds[name].append((time.perf_counter() - start) / calls)
    return {name: quantiles(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="also write the rows here, a JSON object each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    title = f"{where}, {options.threads} torch threads, torch {torch.__version__}"
    table = Table(title=title)
    for heading in ("B x K", "dtype", "method", "ms (median)", "20-80 %", "of plain", "of copy"):
        table.add_column(heading, justify="left" if heading in ("dtype", "method") else "right")
    records = []
    for rows, classes in SIZES:
        for dtype in DTYPES:
            found = measure(rows, classes, dtype, options.device, options.repeats)
            for name, (median, low, high) in found.items():
                record = {
                    "rows": rows,
                    "classes": classes,
                    "dtype": str(dtype).removeprefix("torch."),
                    "method": name,
                    "ms": 1e3 * median,
                    "ms_20": 1e3 * low,
                    "ms_80": 1e3 * high,
                    "of_plain": median / found["plain"][0],
                    "of_copy": median / found["copy"][0],
                }
                records.append({**record, "where": title})
                table.add_row(
                    f"{rows} x {classes}",
                    str(record["dtype"]),
                    name,
                    f"{1e3 * median:.4g}",
                    f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                    f"{record['of_plain']:.2f}",
                    f"{record['of_copy']:.2f}",
                )
            table.add_section()
    Console(width=110).print(table)
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
