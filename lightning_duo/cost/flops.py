"""What a duo costs: operations and parameters of its two models."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_duo.base import Call
from lightning_duo.isolation import evaluating, frozen

# In the names of operations that consist of matrix products.
PRODUCTS_BY_NAME = ("attention", "mm", "conv", "linear", "transformer", "lstm", "gru", "rnn")


class Cost(NamedTuple):
    """Compute and size of base and sidekick."""

    flops_base: int
    """Operations of one forward of the base, a multiply-add counting two."""
    flops_sidekick: int
    """Operations of one forward of the sidekick."""
    parameters_base: int
    """Parameters of the base."""
    parameters_sidekick: int
    """Parameters of the sidekick."""

    @property
    def balance(self) -> float | None:
        """FLOPs of the sidekick over those of the base; None if the base's are not countable."""
        return self.flops_sidekick / self.flops_base if self.flops_base else None


def count_flops(
    module: nn.Module,
    example_input: Any,
    forward: Callable[..., Any] | None = None,
    *,
    fused: bool = False,
) -> int:
    """Floating-point operations of one forward in eval mode; a multiply-add counts two.

    Counted by PyTorch as the operations run. Fused attention and recurrent layers hide their
    products from the counter (ViT-B would lose a third, an LSTM all), so they run unfused here.

    Args:
        module: The model.
        example_input: Its input, or a `Call` with several arguments; cost grows with the batch, so
            use a batch of one.
        forward: How to run the module, ``(module, *args, **kwargs)``; by default it is called.
        fused: Let attention run fused, to see what the counter then misses.

    Returns:
        Operations of convolutions and matrix products. Elementwise work is not counted, nor are
        quantized, sparse, bilinear and deformable layers.

    Example:
        >>> import torch
        >>> count_flops(torch.nn.Linear(10, 5, bias=False), torch.zeros(1, 10))
        100
        >>> call = Call((torch.zeros(1, 4), torch.zeros(1, 5)), {})
        >>> count_flops(torch.nn.ModuleList([torch.nn.Linear(4, 5)]), call, lambda m, x, y: m[0](x))
        40
    """
    call = Call.with_input(example_input)
    with (
        evaluating(module),
        frozen(module),
        _unfused(module, attention=not fused),
        FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter,
    ):
        call.of(partial(forward, module) if forward else module)
    return int(counter.get_total_flops())


def _product(first: torch.Size, second: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a product with a vector, from the shapes."""
    return 2 * first.numel()


def _added_product(added: torch.Size, first: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * first.numel()


PRODUCTS = {  # with vectors, which PyTorch's counter leaves out
    torch.ops.aten.mv: _product,
    torch.ops.aten.dot: _product,
    torch.ops.aten.addmv: _added_product,
}


@contextmanager
def _unfused(module: nn.Module, *, attention: bool) -> Iterator[None]:
    """Run recurrent layers, and attention if it is to be, as the products that they consist of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    with ExitStack() as stack:
        # Other models would be much slower without these.
        for backend in (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ():
            stack.callback(setattr, backend, "enabled", backend.enabled)
            backend.enabled = False  # type: ignore[attr-defined]
        if attention:
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def count_flops_fvcore(module: nn.Module, example_input: Any) -> tuple[int, list[str]]:
    """The same by fvcore, the counter that most papers use, as a second opinion.

    fvcore counts a multiply-add as one, so its total is doubled here. It counts from a trace, in
    which a fused attention is one operation that it does not know; like normalisation and pooling,
    which PyTorch's counter leaves out and fvcore adds, that makes the two differ.

    Args:
        module: The model, one of the kind that can be traced.
        example_input: Its input, a batch of one, or a `Call` of inputs by position.

    Returns:
        The operations, and the names of those that consist of matrix products and were not counted.

    Raises:
        ImportError: If fvcore is missing.
        ValueError: If the call has arguments by name, which fvcore cannot pass on.
    """
    from fvcore.nn import FlopCountAnalysis

    call = Call.with_input(example_input)
    if call.kwargs:
        raise ValueError(
            f"fvcore passes arguments by position only, got {sorted(call.kwargs)} by name"
        )
    with evaluating(module):
        analysis = FlopCountAnalysis(module, call.args)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = 2 * int(analysis.total())
        skipped = sorted(
            name
            for name in analysis.unsupported_ops()
            if any(part in name for part in PRODUCTS_BY_NAME)
        )
    return total, skipped


def measure_cost(base: nn.Module, sidekick: nn.Module, example_input: Any) -> Cost:
    """Operations and parameters of both models.

    Args:
        base: The base, called on ``example_input``.
        sidekick: The sidekick, called on the same input.
        example_input: An input of the base, a batch of one, or a `Call` with several arguments.

    Returns:
        The cost for one sample.

    Example:
        >>> import torch
        >>> measure_cost(torch.nn.Linear(8, 80), torch.nn.Linear(8, 8), torch.zeros(1, 8))
        Cost(flops_base=1280, flops_sidekick=128, parameters_base=720, parameters_sidekick=72)

    Source: Asymmetric Duos, Sec. 3.2.
    """
    return Cost(
        count_flops(base, example_input),
        count_flops(sidekick, example_input),
        count_parameters(base),
        count_parameters(sidekick),
    )


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops_balance(base: nn.Module, sidekick: nn.Module, example_input: Any) -> float:
    """FLOPs of the sidekick over those of the base: the extra compute of the duo.

    Args:
        base: The base, called on ``example_input``.
        sidekick: The sidekick, called on the same input.
        example_input: An input of the base, a batch of one, or a `Call` with several arguments.

    Returns:
        The balance; 0.1 means that the duo costs 10 % more than the base.

    Raises:
        ValueError: If the base does no countable operation.

    Example:
        >>> import torch
        >>> flops_balance(torch.nn.Linear(8, 80), torch.nn.Linear(8, 8), torch.zeros(1, 8))
        0.1

    Source: Asymmetric Duos, Sec. 3.2.
    """
    balance = measure_cost(base, sidekick, example_input).balance
    if balance is None:
        raise ValueError("the base does no convolution or matrix product, so there is no balance")
    return balance


def compare_counters(base: nn.Module, sidekick: nn.Module, sample: Any) -> dict[str, Any]:
    """Operations and parameters, and what other ways of counting would say.

    Args:
        base: The base.
        sidekick: The sidekick.
        sample: An input of batch one, or a `Call` with several arguments.

    Returns:
        The fields of `Cost` and ``balance``; ``balance_fused``, counted while attention runs fused,
        which hides its products from the counter; ``balance_fvcore`` and ``skipped_fvcore``, the
        operations that fvcore could not count (None if it is missing or cannot trace the models);
        ``not_counted``, why PyTorch's counter failed, which leaves all but parameters None.
    """
    try:
        cost = measure_cost(base, sidekick, sample)
        fused = Cost(
            count_flops(base, sample, fused=True),
            count_flops(sidekick, sample, fused=True),
            cost.parameters_base,
            cost.parameters_sidekick,
        )
    except Exception as error:  # of the counter, as for flex attention; a speed needs no count
        others = ("balance", "balance_fused", "balance_fvcore", "skipped_fvcore")
        return {
            **dict.fromkeys((*Cost._fields, *others)),
            "parameters_base": count_parameters(base),
            "parameters_sidekick": count_parameters(sidekick),
            "not_counted": f"{type(error).__name__}: {error}",
        }
    found = {**cost._asdict(), "balance": cost.balance, "balance_fused": fused.balance}
    found["not_counted"] = None
    try:
        (first, one), (second, other) = (
            count_flops_fvcore(model, sample) for model in (base, sidekick)
        )
    except Exception:  # a second opinion only; it cannot trace every model
        return {**found, "balance_fvcore": None, "skipped_fvcore": None}
    skipped = sorted({*one, *other})
    return {**found, "balance_fvcore": second / max(first, 1), "skipped_fvcore": skipped}
