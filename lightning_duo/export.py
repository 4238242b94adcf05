"""A duo as one file that runs where this library is not installed."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_duo._version import __version__
from lightning_duo.base import as_logits
from lightning_duo.files import plain_float, whole
from lightning_duo.isolation import evaluating, frozen
from lightning_duo.module import DuoModule, DuoOutput
from lightning_duo_kernels.composite import head
from lightning_duo_kernels.head import head_operator

Format: TypeAlias = Literal["program", "aoti", "onnx"]
SUFFIX = {"program": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
DESCRIPTION = "lightning_duo"  # its key in the metadata; an exported program adds .json


def export_duo(
    module: DuoModule, path: str | Path, example_input: Any, *, format: Format = "program"
) -> Path:
    """Write a duo as one file for any batch size, which needs neither this library nor Lightning.

    The file maps ``x`` to ``(probs, prediction, confidence, accept)`` of `DuoOutput`, in eval mode,
    on the device and in the precision the module has now. It carries a description of the duo, one
    JSON object: ``temperatures``, ``threshold`` ("Infinity" if nothing is accepted), ``mode``,
    ``num_classes``, ``inputs`` (their shapes and dtypes; null stands for the batch), ``outputs``
    and ``versions``. To run the file, and to read its description:

    - ``program``, which needs PyTorch alone: ``torch.export.load(path).module()(x)``; loading with
      ``extra_files=(extra := {"lightning_duo.json": ""})`` fills in the description.
    - ``aoti``, compiled by AOTInductor for this machine's kind of processor or GPU; on CUDA the
      head is the Triton kernel: ``package = torch._inductor.aoti_load_package(path)``,
      ``package(x)``, ``package.get_metadata()["lightning_duo"]``. Making it needs a C++ compiler.
      It reads ``x`` as it was compiled for, with the example's sizes, dtype and memory layout, and
      does not check that: others give wrong answers.
    - ``onnx``: ``session = onnxruntime.InferenceSession(path)``; outputs have their names, and the
      input is ``x`` where it is one tensor;
      ``session.get_modelmeta().custom_metadata_map["lightning_duo"]``. Making it needs
      ``pip install onnx onnxscript``. Weights of 2 GB and more lie in a second file beside
      it.

    Args:
        module: The duo.
        path: The file to write: ``.pt2``, or ``.onnx``. It appears whole or not at all.
        example_input: A batch as the duo takes it, on the duo's device: a tensor, or tensors in
            lists, tuples and dicts. The first dimension of each is the batch; the other sizes stay
            as they are here.
        format: ``program``, ``aoti`` or ``onnx``.

    Returns:
        The path.

    Raises:
        TypeError: If the module is no duo.
        ValueError: If the format is unknown or the path is not named for it, the example holds no
            batch, lies on another device than the duo or does not fit it, or the duo is in bfloat16
            and goes to ONNX, whose runtime lacks it.
        RuntimeError: If base or sidekick cannot be traced (says which) or depends on the batch
            size.
        ImportError: If ``onnx`` is wanted and its packages are missing.

    Example:
        >>> import torch, tempfile
        >>> duo = DuoModule(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), (1.0, 0.5))
        >>> path = export_duo(duo, f"{tempfile.mkdtemp()}/duo.pt2", torch.randn(2, 4))
        >>> run = torch.export.load(path).module()
        >>> probs, prediction, confidence, accept = run(torch.ones(7, 4))
        >>> prediction.shape
        torch.Size([7])
    """
    path = Path(path)
    _check(module, path, format)
    example = _batch_of_two_or_more(module, example_input)
    precision = torch.autocast(module.temperatures.device.type, enabled=False)  # the weights' own
    with evaluating(module), frozen(module), precision:
        description = _description(module, example)
        program = _traced(module, example)
        with whole(path) as file:
            _WRITERS[format](module, program, file, example, description)
    return path


class _Deployed(nn.Module):
    """The duo with plain types for results, and the head as the format wants it.

    AOTInductor compiles the operator, which is the Triton kernel on CUDA. The other files must load
    where the operator is not known, so they hold the same in plain PyTorch.
    """

    def __init__(self, duo: DuoModule, *, operator: bool) -> None:
        super().__init__()
        self.duo, self.operator = duo, operator
        self.eval()

    @override
    def forward(self, x: Any) -> tuple[Tensor, ...]:
        base, sidekick = self.duo.member_logits(x)
        run: Callable[..., tuple[Tensor, ...]] = head_operator if self.operator else head
        uq_only = self.duo.mode == "uq_only"
        probs, prediction, confidence, _ = run(base, sidekick, self.duo.temperatures, True, uq_only)
        return probs, prediction, confidence, confidence >= self.duo.threshold


class _Member(nn.Module):
    """Base or sidekick alone, whose logits may come in an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    @override
    def forward(self, x: Any) -> Tensor | None:
        return as_logits(self.model(x))


def _any_batch(example: Any, size: Any) -> Any:
    """Which dimensions of the example may have any size, as torch.export wants it said."""
    return tree_map(lambda x: {0: size} if _has_batch(x) else None, example)


def _trace(module: nn.Module, example: Any) -> ExportedProgram:
    shapes = (_any_batch(example, Dim.DYNAMIC),)
    return torch.export.export(module, (example,), dynamic_shapes=shapes)


def _traced(duo: DuoModule, example: Any) -> ExportedProgram:
    """The duo in plain PyTorch, for any batch size, or an error that names the model at fault."""
    try:
        program = _trace(_Deployed(duo, operator=False), example)
    except Exception as error:
        for name in ("base", "sidekick"):
            try:
                _trace(_Member(getattr(duo, name)), example)
            except Exception as cause:
                raise RuntimeError(
                    f"torch.export cannot trace the {name}, {type(getattr(duo, name)).__name__}, "
                    f"for any batch size: {str(cause).strip().splitlines()[0]}; its forward must "
                    "not branch on the values of a tensor, nor assume a batch size (use "
                    "torchvision.transforms.v2, not its older transforms)"
                ) from error
        raise
    _check_other_batches(duo, program, example)
    return program


def _check_other_batches(duo: DuoModule, program: ExportedProgram, example: Any) -> None:
    """Run the program on batches unlike the example: a branch on their size is lost in a trace."""
    size = next(len(x) for x in tree_leaves(example) if _has_batch(x))
    uppers = [bound.upper for bound in program.range_constraints.values()]
    # Large limits are those of kernels' indices.
    most = min((upper for upper in uppers if upper < 1 << 15), default=None)
    run = program.module()
    for other in (1, size + 1, 2 * size + 2):
        rows = torch.arange(other, device=duo.temperatures.device) % size
        batch = tree_map(lambda x: x[rows] if _has_batch(x) else x, example)  # noqa: B023
        cause = None
        try:
            same = all(
                torch.allclose(mine.float(), theirs.float(), rtol=0, atol=1e-2, equal_nan=True)
                for mine, theirs in zip(run(batch)[::2], duo(batch)[::2], strict=True)
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


def _write_program(
    duo: DuoModule, program: ExportedProgram, path: Path, example: Any, description: str
) -> None:
    torch.export.save(program, path, extra_files={f"{DESCRIPTION}.json": description})


def _write_aoti(
    duo: DuoModule, program: ExportedProgram, path: Path, example: Any, description: str
) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(
        _trace(_Deployed(duo, operator=True), example),
        package_path=str(path),
        inductor_configs={"aot_inductor.metadata": {DESCRIPTION: description}},
    )


def _write_onnx(
    duo: DuoModule, program: ExportedProgram, path: Path, example: Any, description: str
) -> None:
    # By name: a mapping in last place would be taken for keyword arguments.
    onnx = torch.onnx.export(
        _Deployed(duo, operator=False),
        kwargs={"x": example},
        dynamic_shapes={"x": _any_batch(example, "batch")},
        output_names=list(DuoOutput._fields),
        dynamo=True,
        verbose=False,
    )
    assert onnx is not None
    onnx.model.metadata_props[DESCRIPTION] = description
    onnx.save(path)


_WRITERS: dict[str, Callable[[DuoModule, ExportedProgram, Path, Any, str], None]] = {
    "program": _write_program,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}


def _check(module: DuoModule, path: Path, format: str) -> None:
    if not isinstance(module, DuoModule):
        raise TypeError(f"export_duo exports a DuoModule, got {type(module).__name__}")
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}")
    if path.suffix != SUFFIX[format]:
        raise ValueError(f"a file of format {format!r} must be named *{SUFFIX[format]}, got {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file to write")
    if format != "onnx":
        return
    if find_spec("onnxscript") is None:
        raise ImportError("export to ONNX needs onnx and onnxscript: pip install onnx onnxscript")
    if any(x.dtype == torch.bfloat16 for x in module.state_dict().values()):
        raise ValueError(
            "ONNX Runtime does not run bfloat16 models; export duo.float() or duo.half()"
        )


def _has_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def _batch_of_two_or_more(module: DuoModule, example: Any) -> Any:
    """The example; a batch of one is doubled, as export would take its size for a constant."""
    batched = [x for x in tree_leaves(example) if _has_batch(x)]
    sizes = {len(x) for x in batched}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "example_input must be a batch: tensors whose first dimension is the number of "
            f"samples, at least one; got sizes {sorted(sizes) or 'of no tensor'}"
        )
    devices, own = {x.device for x in batched}, module.temperatures.device
    if devices != {own}:
        raise ValueError(
            f"example_input is on {', '.join(map(str, devices))}, the duo on {own}; move one of "
            "them with .to(device)"
        )
    if sizes == {1}:
        return tree_map(lambda x: torch.cat([x, x]) if _has_batch(x) else x, example)
    return example


def _description(module: DuoModule, example: Any) -> str:
    inputs = [
        {"shape": [None, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
        for x in tree_leaves(example)
        if _has_batch(x)
    ]
    try:
        logits, _ = module.member_logits(example)
    except Exception as error:
        raise ValueError(
            f"the duo cannot run example_input, which holds {inputs} (null is the batch): {error}"
        ) from error
    return json.dumps(
        {
            "temperatures": module.temperatures.tolist(),
            "threshold": plain_float(module.threshold.item()),
            "mode": module.mode,
            "num_classes": logits.shape[1],
            "inputs": inputs,
            "outputs": DuoOutput._fields,
            "versions": {"lightning_duo": __version__, "torch": torch.__version__},
        }
    )
