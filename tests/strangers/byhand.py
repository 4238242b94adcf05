"""Logits, temperatures and answers by hand, in float64."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

IGNORED = -100  # target of a place that does not count; NaN where the layout is "labels"


class Truth(NamedTuple):
    """What a step is about, by hand."""

    logits: Tensor
    """In the layout in which the deployed duo answers."""
    targets: Tensor
    """Shape of the logits without their classes; for "labels" the shape of the logits."""


def plain(x: Tensor) -> Tensor:
    """Float64, and no subclass of Tensor."""
    return x.detach().as_subclass(Tensor).double()


def rows(layout: str, truth: Truth) -> tuple[Tensor, Tensor]:
    """Logits (R, K) and targets (R,) of all decisions that count."""
    logits, targets = plain(truth.logits), truth.targets.detach().as_subclass(Tensor)
    if layout == "labels":
        z, y = logits.reshape(-1), targets.double().reshape(-1)
        z, y = z[~y.isnan()], y[~y.isnan()]
        return torch.stack([torch.zeros_like(z), z], 1), y.long()
    if layout == "classes":
        logits = logits.movedim(1, -1)
    assert logits.shape[:-1] == targets.shape, "the truth of this case is no truth"
    kept = targets.reshape(-1) != IGNORED
    return logits.reshape(-1, logits.shape[-1])[kept], targets.reshape(-1)[kept].long()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Of every row, (R,)."""
    picked = logits.double().gather(1, targets[:, None])[:, 0]
    return logits.double().logsumexp(1) - picked


def best_temperatures(base: Tensor, side: Tensor, targets: Tensor) -> np.ndarray:
    """SciPy's optimum over both temperatures, from several starts."""
    a, b, y = base.numpy(), side.numpy(), targets.numpy()
    each = np.arange(len(y))

    def loss(t: np.ndarray) -> tuple[float, np.ndarray]:
        z = t[0] * a + t[1] * b
        top = z.max(1, keepdims=True)
        p = np.exp(z - top)
        total = p.sum(1, keepdims=True)
        p /= total
        value = (np.log(total[:, 0]) + top[:, 0] - z[each, y]).mean()
        return value, np.array([((p * x).sum(1) - x[each, y]).mean() for x in (a, b)])

    starts = [(1.0, 1.0), (0.05, 0.05), (0.0, 1.0), (1.0, 0.0), (5.0, 0.3)]
    settings = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 5000}
    found = [
        minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2, options=settings)
        for start in starts
    ]
    return min(found, key=lambda one: one.fun).x


class Answer(NamedTuple):
    """What a duo must say, by hand."""

    probs: Tensor
    prediction: Tensor
    confidence: Tensor
    sure: Tensor
    """Where the prediction is no tie."""


def answer(layout: str, base: Tensor, side: Tensor, temperatures: tuple[float, float]) -> Answer:
    """From the logits of both models, in their layout."""
    z = temperatures[0] * plain(base) + temperatures[1] * plain(side).view(base.shape)
    if layout == "labels":
        p = 1 / (1 + torch.exp(-z))
        return Answer(p, (p > 0.5).long(), torch.maximum(p, 1 - p), (p - 0.5).abs() > 1e-5)
    dim = 1 if layout == "classes" else -1
    exp = torch.exp(z - z.amax(dim, keepdim=True))
    p = exp / exp.sum(dim, keepdim=True)
    top = p.topk(2, dim).values
    first, second = top.unbind(dim)
    return Answer(p, p.argmax(dim), first, first - second > 1e-5)
