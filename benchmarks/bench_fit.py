"""How long fitting the two temperatures takes, beside general optimisers of the same problem.

    python benchmarks/bench_fit.py [--repeats 5] [--threads 1]

All find the minimum of the same NLL in float64 from the same logits; runs are interleaved and
medians are shown with the ratio to fit_temperatures. Ours also fits each model alone, the others
only the duo.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from torch import Tensor

from lightning_duo import fit_temperatures

SIZES = ((2500, 10), (7000, 257), (7000, 1000), (50000, 257))


def two_models(count: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two correlated models that are right about 80 % of the time, and targets."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (count,), generator=generator)
    base, sidekick, shared = torch.randn(3, count, classes, generator=generator)
    margin = 1.5 + classes**0.2
    for logits, quality in ((base, 1.0), (sidekick, 0.7)):
        logits += 0.5 * shared
        logits[torch.arange(count), targets] += quality * margin
    return 1.5 * base, 1.5 * sidekick, targets


def torch_lbfgs(base: Tensor, sidekick: Tensor, targets: Tensor) -> float:
    """L-BFGS with strong Wolfe line search on the whole set."""
    a, b = base.double(), sidekick.double()
    t = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(t[0] * a + t[1] * b, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure().detach())


def scipy_lbfgsb(base: Tensor, sidekick: Tensor, targets: Tensor) -> float:
    """L-BFGS-B on T >= 0 with analytic gradients."""
    a, b = base.double().numpy(), sidekick.double().numpy()
    rows, y = np.arange(len(targets)), targets.numpy()

    def nll(t: np.ndarray) -> tuple[float, np.ndarray]:
        z = t[0] * a + t[1] * b
        z -= z.max(1, keepdims=True)
        p = np.exp(z)
        total = p.sum(1, keepdims=True)
        p /= total
        value = float((np.log(total[:, 0]) - z[rows, y]).mean())
        slopes = [float(((p * m).sum(1) - m[rows, y]).mean()) for m in (a, b)]
        return value, np.array(slopes)

    return float(minimize(nll, [0.5, 0.5], jac=True, bounds=[(0, None)] * 2).fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
        "fit_temperatures": lambda *data: fit_temperatures(*data).nll,
        "torch L-BFGS": torch_lbfgs,
        "scipy L-BFGS-B": scipy_lbfgsb,
    }
    table = Table(title=f"CPU, {options.threads} torch threads, torch {torch.__version__}")
    for heading in ("N x K", "method", "ms (median)", "of ours", "NLL above the best"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for count, classes in SIZES:
        data = two_models(count, classes)
        found = {name: method(*data) for name, method in methods.items()}  # also the warm-up
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(options.repeats):
            for name, method in methods.items():
                start = time.perf_counter()
                method(*data)
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            table.add_row(
                f"{count} x {classes}",
                name,
                f"{1000 * median:.1f}",
                f"{median / medians['fit_temperatures']:.1f}",
                f"{found[name] - min(found.values()):.1e}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
