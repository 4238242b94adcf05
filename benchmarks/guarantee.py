"""How often thresholds with a guarantee miss their target on new data, by simulation.

    python benchmarks/guarantee.py [--draws 300] [--samples 1000] [--accuracy 0.85] [--delta 0.1]

Each draw makes validation logits of two models, fits the temperatures and chooses the threshold on
them, as the callback does, and judges it on one large set of new samples.
"""

import argparse

import torch
from torch import Tensor

from lightning_duo import TemperatureFit, fit_temperatures
from lightning_duo.selective import select_thresholds

CLASSES, MARGIN, NEW = 4, 1.5, 200_000


def logits(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two correlated models, the second a little worse, and targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    shared, first, second = torch.randn(3, count, CLASSES, generator=generator)
    right = MARGIN * torch.nn.functional.one_hot(targets, CLASSES)
    return first + 0.5 * shared + right, second + 0.5 * shared + 0.7 * right, targets


def judged(fit: TemperatureFit, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Confidence of the duo, and whether it is right."""
    duo = fit.temperatures.base * data[0] + fit.temperatures.sidekick * data[1]
    confidence, prediction = duo.softmax(1).max(1)
    return confidence, prediction == data[2]


def main() -> None:
    """Run the draws and print how often, and at what coverage, the target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--accuracy", type=float, default=0.85)
    parser.add_argument("--delta", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    new = logits(NEW, seed=1_000_000)
    missed, coverage, best = {options.delta: 0, None: 0}, 0.0, 0.0
    for seed in range(options.draws):
        data = logits(options.samples, seed)
        fit = fit_temperatures(*data)
        confidence, right = judged(fit, new)
        for delta in missed:
            (found,) = select_thresholds(*judged(fit, data), [options.accuracy], delta=delta)
            accepted = confidence >= found.value
            missed[delta] += bool(right[accepted].double().mean() < options.accuracy)
            if delta is not None:
                coverage += float(accepted.double().mean()) / options.draws
        (oracle,) = select_thresholds(confidence, right, [options.accuracy])
        best += oracle.coverage / options.draws
    shares = [100 * count / options.draws for count in missed.values()]
    print(
        f"{options.draws} draws of {options.samples} samples, target {options.accuracy:g}: with "
        f"delta={options.delta:g} {shares[0]:.1f} % missed it on {NEW} new samples at a mean "
        f"coverage of {100 * coverage:.1f} % (best possible {100 * best:.1f} %); without delta "
        f"{shares[1]:.1f} % missed it"
    )


if __name__ == "__main__":
    main()
