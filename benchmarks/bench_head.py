"""What the duo head costs, beside plain PyTorch, the published procedure and a copy of its bytes.

    python benchmarks/bench_head.py [--quick] [--device cuda] [--threads 1]

- plain: what one writes without this library: the weighted sum, softmax, max and argmax, in float32
  and without entropy; "plain, compiled" is the same under Inductor.
- published: the head of the code published with the paper; it computes in the logits' dtype.
- head: our operator, with entropy, as it is, compiled, and compiled without the probabilities.
- copy: copies as many bytes as the head reads and writes at the least: both logits and the
  probabilities, or the logits alone for the head without them. GB/s is those bytes over the time;
  the copy's is what the memory gives.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Growth, Options, Row, parser, run
from published import published_head
from torch import Tensor

from lightning_duo.cost import interleave, peak_memory
from lightning_duo_kernels import duo_head

SIZES = (
    (1, 10),
    (1, 1000),
    (128, 10),
    (1024, 257),
    (1024, 1000),
    (4096, 1000),
    (256, 21841),
    (64, 151936),
)
ROWS = tuple((1024, classes) for classes in (10, 10_000))  # for growth with K, beside 1000
BATCHES = tuple((rows, 1000) for rows in (32, 16_384))  # for growth with N
QUICK = ((1024, 100), (1024, 1000), (1024, 10_000))
HALF = (1024, 1000)  # also in float16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROWTH = (
    Growth("classes", {"samples": 1024, "dtype": "float32"}, ("ms", "peak_mb")),
    Growth("samples", {"classes": 1000, "dtype": "float32"}, ("ms", "peak_mb")),
)


def plain(base: Tensor, sidekick: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, prediction and confidence, as one would write them."""
    probs = torch.softmax(t[0] * base.float() + t[1] * sidekick.float(), dim=1)
    return probs, probs.argmax(dim=1), probs.amax(dim=1)


def without_probs(base: Tensor, sidekick: Tensor, t: Tensor) -> Any:
    """The head when only prediction, confidence and entropy are wanted."""
    return duo_head(base, sidekick, t, return_probs=False)


def methods(base: Tensor, sidekick: Tensor) -> dict[str, Callable[[], Any]]:
    """Everything to time on these logits."""
    t = torch.tensor([1.3, 0.4], device=base.device)
    torch._dynamo.reset()
    compiled = {f: torch.compile(f, fullgraph=True) for f in (plain, duo_head, without_probs)}
    source = torch.empty(base.nbytes, dtype=torch.uint8, device=base.device).fill_(1)
    target = torch.empty_like(source)
    wide = torch.empty(2 * base.numel(), dtype=torch.uint8, device=base.device).fill_(1)
    wider = torch.empty_like(wide)

    def copy_logits() -> None:
        target.copy_(source)  # reads and writes half of the logits' bytes each

    def copy() -> None:
        copy_logits()
        wider.copy_(wide)  # and half of the probabilities'

    return {
        "plain": lambda: plain(base, sidekick, t),
        "published": lambda: published_head(base, sidekick, t),
        "plain, compiled": lambda: compiled[plain](base, sidekick, t),
        "head": lambda: duo_head(base, sidekick, t),
        "head, compiled": lambda: compiled[duo_head](base, sidekick, t),
        "head, compiled, no probs": lambda: compiled[without_probs](base, sidekick, t),
        "copy": copy,
        "copy, no probs": copy_logits,
    }


def traffic(base: Tensor, method: str) -> int:
    """Bytes that must be read and written at the least."""
    probs = 0 if "no probs" in method else 4 * base.numel()
    return 2 * base.nbytes + probs


def measure(
    asked: Options,
    sizes: tuple[tuple[int, int], ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> Iterator[Row]:
    """Rows for all sizes and dtypes."""
    sizes = sizes or (QUICK if asked.quick else (*SIZES, *ROWS, *BATCHES))
    growing = {*ROWS, *BATCHES}
    for rows, classes in sorted(set(sizes), key=lambda size: (size[0] * size[1], size)):
        few = asked.quick or (rows, classes) in growing
        chosen = DTYPES if (rows, classes) == HALF else DTYPES[:2]
        for dtype in dtypes or (DTYPES[:1] if few else chosen):
            generator = torch.Generator().manual_seed(0)
            base, sidekick = (
                (3 * torch.randn(rows, classes, generator=generator)).to(asked.device, dtype)
                for _ in range(2)
            )
            case = {"samples": rows, "classes": classes, "dtype": str(dtype).split(".")[1]}
            with torch.inference_mode():
                timed = methods(base, sidekick)
                timing = interleave(timed, repeats=2 * asked.repeats, device=asked.device)
                for name, method in timed.items():
                    row = {**case, **timing.row(name, "plain")}
                    copied = timing.ratio(name, "copy, no probs" if "no probs" in name else "copy")
                    peak = peak_memory(method, asked.device)
                    yield row | {
                        "of_copy": copied.median,
                        "of_copy_20": copied.low,
                        "of_copy_80": copied.high,
                        "gb_per_s": traffic(base, name) / row["ms"] / 1e6,
                        "peak_mb": None if peak is None else peak / 1e6,
                    }


if __name__ == "__main__":
    run("head", parser(__doc__).parse_args(), measure, GROWTH)
