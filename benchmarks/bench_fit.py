"""How long fitting the two temperatures takes, beside other ways to fit them.

    python benchmarks/bench_fit.py [--quick] [--device cuda] [--threads 1]

- fit_temperatures: ours; it also fits base and sidekick alone, the others only the duo.
- published: grid and L-BFGS of the code published with the paper (float32; up to 8 * 10^6 logits).
- torch L-BFGS: with strong Wolfe line search, in float64.
- scipy L-BFGS-B: on T >= 0 with analytic gradients, in float64 (CPU).
- torch-uncertainty: its TemperatureScaler with its defaults; it fits one temperature, the base's.

Beyond 2 * 10^7 logits only scipy (torch L-BFGS on CUDA) is measured beside ours.

"excess" is the NLL (float64, in nats) above the lowest that any method found; for torch-uncertainty
above that of the base at its best temperature. "passes" are reads of all logits. Memory is what a
fit needs beyond the logits. The profile of some sizes says where the time goes: a fit of ours is
one to three passes of ours, and a share for subsamples; a published one is 675 of its passes.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from harness import Growth, Options, Row, parser, run
from published import published_fit, published_loss
from scipy.optimize import minimize
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_duo import fit_temperatures
from lightning_duo.cost import environment, interleave, peak_memory
from lightning_duo.temperature.samples import check_samples
from lightning_duo_kernels.nll import Point, nll_sums

Data: TypeAlias = tuple[Tensor, Tensor, Tensor]
Found: TypeAlias = tuple[float, float, int]
"""Temperatures of base and sidekick, and passes."""

OURS, ONE = "fit_temperatures", "torch-uncertainty"
PROFILED = ((2500, 1000), (7000, 257))
QUICK = ((2500, 10), (2500, 100), *PROFILED)
SIZES = (
    *QUICK,
    (7000, 1000),
    (50_000, 257),
    *((samples, 10) for samples in (10_000, 100_000, 1_000_000)),
    (2500, 21841),
)
PUBLISHED_LOGITS = 8 * 10**6  # of one model; 675 passes over more take minutes
LARGE_LOGITS = 2 * 10**7  # of one model; beyond, only the quickest of the others is run
GROWTH = (
    Growth("samples", {"part": "fit", "classes": 10}, ("ms", "peak_mb")),
    Growth("classes", {"part": "fit", "samples": 2500}, ("ms", "peak_mb")),
)


def two_models(samples: int, classes: int) -> Data:
    """Logits of two correlated models that are right about 80 % of the time, and targets."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (samples,), generator=generator)
    base, sidekick, shared = torch.randn(3, samples, classes, generator=generator)
    margin = 1.5 + classes**0.2
    for logits, quality in ((base, 1.0), (sidekick, 0.7)):
        logits += 0.5 * shared
        logits[torch.arange(samples), targets] += quality * margin
    return 1.5 * base, 1.5 * sidekick, targets


def ours(base: Tensor, sidekick: Tensor, targets: Tensor) -> Found:
    fit = fit_temperatures(base, sidekick, targets)
    return *fit.temperatures, fit.passes


def torch_lbfgs(base: Tensor, sidekick: Tensor, targets: Tensor) -> Found:
    """L-BFGS with strong Wolfe line search on the whole set."""
    a, b, passes = base.double(), sidekick.double(), 0
    t = torch.full((2,), 0.5, dtype=torch.float64, device=base.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(t[0] * a + t[1] * b, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return t[0].item(), t[1].item(), passes


def scipy_lbfgsb(base: Tensor, sidekick: Tensor, targets: Tensor) -> Found:
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

    found = minimize(nll, [0.5, 0.5], jac=True, bounds=[(0, None)] * 2)
    return float(found.x[0]), float(found.x[1]), int(found.nfev)


def torch_uncertainty(base: Tensor, sidekick: Tensor, targets: Tensor) -> Found:
    """The temperature of the base alone, by another library's class as it is documented."""
    from torch_uncertainty.post_processing import TemperatureScaler

    logging.getLogger().setLevel(logging.ERROR)  # it warns of what is meant
    scaler = TemperatureScaler(model=torch.nn.Identity(), device=base.device)
    data = DataLoader([(base, targets)], batch_size=None)
    passes, scale = 0, scaler._scale

    def counted(logits: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return scale(logits)

    scaler._scale = counted
    scaler.fit(data, progress=False)
    return float(scaler.inv_temp), 0.0, passes


def nll(t: Found, data: Data) -> float:
    """Mean NLL in float64, by PyTorch's own loss."""
    parts = zip(*(part.split(max(1, 10**6 // data[0].shape[1])) for part in data), strict=True)
    total = sum(
        torch.nn.functional.cross_entropy(
            t[0] * a.double() + t[1] * b.double(), y, reduction="sum"
        ).item()
        for a, b, y in parts
    )
    return float(total) / len(data[2])


def chosen(data: Data) -> dict[str, Callable[[], Found]]:
    """The methods that can fit these data here."""
    found: dict[str, Callable[..., Found]] = {OURS: ours}
    if data[0].numel() > LARGE_LOGITS:
        quickest = torch_lbfgs if data[0].is_cuda else scipy_lbfgsb
        found["torch L-BFGS" if data[0].is_cuda else "scipy L-BFGS-B"] = quickest
        return {name: partial(fit, *data) for name, fit in found.items()}
    if data[0].numel() <= PUBLISHED_LOGITS:
        found["published"] = published_fit
    found["torch L-BFGS"] = torch_lbfgs
    if not data[0].is_cuda:
        found["scipy L-BFGS-B"] = scipy_lbfgsb
    try:
        import torch_uncertainty as _  # noqa: F401

        found[ONE] = torch_uncertainty
    except ImportError:
        print("torch-uncertainty is not installed, so it is not measured")
    return {name: partial(fit, *data) for name, fit in found.items()}


def _keep(found: dict[str, Found], name: str, method: Callable[[], Found]) -> None:
    found[name] = method()


def rows_of(data: Data, case: dict[str, Any], asked: Options) -> Iterator[Row]:
    """A row for each method on one set of logits."""
    methods = chosen(data)
    found: dict[str, Found] = {}
    kept = {name: partial(_keep, found, name, method) for name, method in methods.items()}
    budget = 10 if asked.quick else 20
    timing = interleave(kept, repeats=asked.repeats, device=asked.device, budget=budget)
    losses = {name: nll(t, data) for name, t in found.items()}
    best = min(loss for name, loss in losses.items() if name != ONE)
    base_alone = nll((*fit_temperatures(*data).scaled_base, 0), data)
    for name, method in methods.items():
        peak = peak_memory(method, asked.device)
        yield {
            "part": "fit",
            **case,
            **timing.row(name, OURS),
            "passes": found[name][2],
            "excess": losses[name] - (base_alone if name == ONE else best),
            "peak_mb": None if peak is None else peak / 1e6,
        }


def profile(data: Data, case: dict[str, Any], asked: Options) -> Iterator[Row]:
    """A pass of each kind, and the exponentials that a pass of ours cannot do without."""
    base, sidekick, targets = data
    points = [Point((1.0, 0.5), (True, True)), Point((1.0, 0.0), (True, False))]
    points.append(Point((0.0, 1.0), (False, True)))
    divisors = torch.tensor(0.5), torch.tensor(1.0)
    small, spare = base[:200].clone(), torch.empty_like(base[:200])
    times = 3 * len(base) // len(small)

    def exponentials() -> None:
        for _ in range(times):  # in the cache, as a pass does
            torch.exp2(small, out=spare)

    methods = {
        "a pass of ours (duo, base, sidekick)": lambda: nll_sums(
            base, sidekick, targets, points, masked=False, dtype=torch.float32
        ),
        "a published pass": lambda: published_loss(base, sidekick, targets, *divisors),
        "torch.exp2 of three times the logits": exponentials,
        "checking the input": lambda: check_samples(base, sidekick, targets),
        OURS: lambda: ours(*data),
    }
    timing = interleave(methods, repeats=2 * asked.repeats, device=asked.device)
    for name in methods:
        yield {"part": "profile", **case, **timing.row(name, OURS)}


def measure(asked: Options, sizes: tuple[tuple[int, int], ...] | None = None) -> Iterator[Row]:
    """Rows for all sizes."""
    for samples, classes in sizes or (QUICK if asked.quick else SIZES):
        base, sidekick, targets = (x.to(asked.device) for x in two_models(samples, classes))
        case = {"samples": samples, "classes": classes}
        yield from rows_of((base, sidekick, targets), case, asked)
        if (samples, classes) in PROFILED:
            yield from profile((base, sidekick, targets), case, asked)
            if not asked.quick and asked.threads == 1 and (cores := environment()["cores"]) > 1:
                torch.set_num_threads(cores)
                for row in rows_of((base, sidekick, targets), case, asked):
                    yield {**row, "part": "fit, all cores", "threads": cores}
                torch.set_num_threads(1)


if __name__ == "__main__":
    run("fit", parser(__doc__).parse_args(), measure, GROWTH)
