"""Whether weights are still what they were: a number for all of them."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

CHUNK = 1 << 22  # numbers that are widened at a time
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds a part of the module's weights only (FSDP2)."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


@torch.no_grad()
def fingerprint(module: nn.Module) -> int | None:
    """A number that changes with the weights, the same on every device; None if sharded.

    Weights are parameters and the statistics of batch normalisation. Bits are summed as integers,
    so the order of summation does not matter.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> _ = layer.weight.data.mul_(1.5)
        >>> fingerprint(layer) == before
        False
    """
    if is_sharded(module):
        return None
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
    sums = [
        # Summed at once, whole numbers would be widened at once too.
        torch.stack([part.sum() for part in _bits(tensor.detach())]).sum()
        for tensor in (*module.parameters(), *statistics)
        if tensor is not None and not (tensor.is_complex() or tensor.is_meta or is_lazy(tensor))
    ]
    found = 0
    for value in torch.stack(sums).tolist() if sums else []:
        found = (found * 1_000_003 + value) % (2**61 - 1)
    return found


@torch.no_grad()
def exact_fingerprint(module: nn.Module) -> int | None:
    """A number that changes with any bit of any parameter or buffer, and where it stands.

    None if the module is sharded.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = exact_fingerprint(layer)
        >>> layer.weight.data = layer.weight.data.flip(0)
        >>> exact_fingerprint(layer) == before
        False
    """
    if is_sharded(module):
        return None
    found = 0
    odd: dict[torch.device, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta or is_lazy(tensor) or tensor.layout != torch.strided:
            continue
        real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if real.device not in odd:
            places = torch.arange(CHUNK, device=real.device)
            odd[real.device] = 2 * (places * 0x5851F42D + places * places) + 1
        # Each number counts an odd number of times that tells its place.
        sums = [(part * odd[real.device][: len(part)]).sum() for part in _bits(real)]
        for value in (tensor.numel(), *torch.stack(sums).tolist()):
            found = (found * 1_000_003 + value) % (2**61 - 1)
    return found


def _bits(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor's bits as whole numbers, in chunks."""
    bits = tensor.contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    return torch.split(bits, CHUNK)
