"""What the code published with the paper does, in our own words, to measure against it.

Source: https://github.com/timgzhou/asymmetric-duos at d0f2efa: ``evaluate/3_duo_temp_scale.py`` for
the fit, ``load_models/DuoWrapper.py`` (mode "asymmetric") for the head.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = torch.arange(0.05, 5.05, 0.2)  # 25 divisors for each model


def published_head(base: Tensor, sidekick: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, prediction and uncertainty of the weighted duo.

    The uncertainty is one less the confidence, plus a tenth of the divergence between the scaled
    models.

    Args:
        base: Logits (N, K).
        sidekick: Logits (N, K).
        t: Multipliers (2,), half the inverses of the divisors that are published.
    """
    scaled_base, scaled_sidekick = base * (2 * t[0]), sidekick * (2 * t[1])
    probs = torch.softmax((scaled_base + scaled_sidekick) / 2, dim=-1)
    confidence = probs.max(dim=-1).values
    torch.softmax(scaled_base, dim=-1)  # computed there too, and not used
    other = torch.softmax(scaled_sidekick, dim=-1)
    log_base = torch.log_softmax(scaled_base, dim=-1)
    divergence = F.kl_div(log_base, other, reduction="none").sum(dim=-1)
    return probs, probs.argmax(dim=-1), 1 - confidence + 0.1 * divergence


def published_loss(
    base: Tensor, sidekick: Tensor, targets: Tensor, divisor_base: Tensor, divisor_sidekick: Tensor
) -> Tensor:
    """Mean NLL of the average of the divided logits: one pass of the published fit."""
    return F.cross_entropy((base / divisor_base + sidekick / divisor_sidekick) / 2, targets)


def published_fit(base: Tensor, sidekick: Tensor, targets: Tensor) -> tuple[float, float, int]:
    """The two temperatures as multipliers, and the number of passes over the logits.

    All 625 pairs of a grid of divisors are tried in float32, then L-BFGS starts from the best.
    """
    data = (base, sidekick, targets)
    pairs = list(itertools.product(GRID, GRID))
    best = min(pairs, key=lambda pair: published_loss(*data, *pair).item())
    passes = len(pairs)
    divisors = [part.clone().reshape(1).to(base.device).requires_grad_() for part in best]
    optimizer = torch.optim.LBFGS(divisors, lr=0.01, max_iter=50)

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        value = published_loss(*data, *divisors)
        value.backward()
        return value

    optimizer.step(closure)
    found = [0.5 / divisor.item() for divisor in divisors]
    return found[0], found[1], passes
