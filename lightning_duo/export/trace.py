"""A duo as a program for any batch size, from an example of its inputs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_duo.base import Call, logits_in
from lightning_duo.module import DuoModule
from lightning_duo_kernels import HeadOutput
from lightning_duo_kernels.head import head_operator


class Inputs(NamedTuple):
    """The arguments of a call; in a file each has a name."""

    values: tuple[Any, ...]
    names: tuple[str, ...]
    by_name: int
    """How many of them, the last ones, the call gives by name."""

    @classmethod
    def of(cls, call: Call, base: nn.Module) -> "Inputs":
        """Inputs with the names that the base's forward gives them; ``x`` if there is but one."""
        known = inspect.signature(base.forward).parameters.values()
        usual = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        places = range(len(call.args))
        names = [usual[i] if i < len(usual) else f"x{i}" for i in places]
        names += call.kwargs
        if len(names) == len(call.args) == 1:
            names = ["x"]
        return cls((*call.args, *call.kwargs.values()), tuple(names), len(call.kwargs))

    def call(self) -> Call:
        """The inputs as the models take them."""
        places = len(self.values) - self.by_name
        named = zip(self.names[places:], self.values[places:], strict=True)
        return Call(self.values[:places], dict(named))

    def changed(self, change: Callable[[Tensor], Any]) -> "Inputs":
        """The same with every batch changed."""
        values = tree_map(lambda x: change(x) if has_batch(x) else x, self.values)
        return self._replace(values=values)

    def any_batch(self, size: Any) -> dict[str, Any]:
        """Which dimensions of each input may have any size, as torch.export wants it said."""
        shapes = tree_map(lambda x: {0: size} if has_batch(x) else None, self.values)
        return dict(zip(self.names, shapes, strict=True))


def has_batch(x: Any) -> bool:
    """Whether this is a tensor with a dimension for the batch."""
    return isinstance(x, Tensor) and x.ndim > 0


class Deployed(nn.Module):
    """A model whose arguments have the names of the inputs, by which a trace knows them."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()

        def forward(*args: Any, **kwargs: Any) -> Any:
            values = signature.bind(*args, **kwargs).args
            return inputs._replace(values=values).call().of(model)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in inputs.names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.model, self.forward = model, forward
        self.eval()


class Outputs(nn.Module):
    """The duo with plain types for results, and the head as the format wants it.

    AOTInductor compiles the operator, which is the Triton kernel on CUDA. The other files must load
    where the operator is not known, so they hold the same in plain PyTorch.
    """

    def __init__(self, duo: DuoModule, *, operator: bool = False) -> None:
        super().__init__()
        self.duo, self.operator = duo, operator

    @override
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        logits = self.duo.member_logits(*args, **kwargs)
        return tuple(
            self.duo.head(*logits, rows_head=_operator) if self.operator else self.duo.head(*logits)
        )


def _operator(base: Tensor, sidekick: Tensor, temperatures: Tensor, *, uq_only: bool) -> HeadOutput:
    return HeadOutput(*head_operator(base, sidekick, temperatures, True, uq_only))


class _Member(nn.Module):
    """Base or sidekick alone, whose logits may come in an object."""

    def __init__(self, duo: DuoModule, name: str) -> None:
        super().__init__()
        self.model, self.path = getattr(duo, name), duo.logits_at

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return logits_in(self.model(*args, **kwargs), self.path)


def trace(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """A model as a program that is called as the model is."""
    call, shapes = inputs.call(), inputs.any_batch(Dim.DYNAMIC)
    deployed = Deployed(model, inputs)
    return torch.export.export(deployed, call.args, call.kwargs, dynamic_shapes=shapes)


def traced(duo: DuoModule, inputs: Inputs) -> ExportedProgram:
    """The duo in plain PyTorch, for any batch size.

    Raises:
        RuntimeError: If base or sidekick cannot be traced, or computes something else for other
            batch sizes; says which.
    """
    try:
        program = trace(Outputs(duo), inputs)
    except Exception as error:
        for name in ("base", "sidekick"):
            try:
                trace(_Member(duo, name), inputs)
            except Exception as cause:
                raise RuntimeError(
                    f"torch.export cannot trace the {name}, {type(getattr(duo, name)).__name__}, "
                    f"for any batch size: {str(cause).strip().splitlines()[0]}; its forward must "
                    "not branch on the values of a tensor, nor assume a batch size (use "
                    "torchvision.transforms.v2, not its older transforms)"
                ) from error
        raise
    _check_other_batches(duo, program, inputs)
    return program


def _check_other_batches(duo: DuoModule, program: ExportedProgram, inputs: Inputs) -> None:
    """Run the program on batches unlike the example: a branch on their size is lost in a trace."""
    size = next(len(x) for x in tree_leaves(inputs.values) if has_batch(x))
    uppers = [bound.upper for bound in program.range_constraints.values()]
    # Large limits are those of kernels' indices.
    most = min((upper for upper in uppers if upper < 1 << 15), default=None)
    run = program.module()
    for other in (1, size + 1, 2 * size + 2):
        rows = torch.arange(other, device=duo.temperatures.device) % size
        call = inputs.changed(lambda x: x[rows]).call()  # noqa: B023
        cause = None
        try:
            same = all(
                torch.allclose(mine.float(), theirs.float(), rtol=0, atol=1e-2, equal_nan=True)
                for mine, theirs in zip(call.of(run)[::2], call.of(duo)[::2], strict=True)
            )
        except Exception as error:  # a guard on the size
            same, cause = False, error
        if most is not None or not same:
            unlike = f"of {other}" if most is None else f"of more than {most}"
            raise RuntimeError(
                f"base or sidekick computes something else for a batch {unlike} than for the "
                f"{size} samples of its trace, so one file cannot serve both; make its forward "
                "independent of the batch size"
            ) from cause
