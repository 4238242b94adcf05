"""Writing a duo as a file: what is refused, the formats, the description."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_duo import nested
from lightning_duo._version import __version__
from lightning_duo.base import Call
from lightning_duo.batch import describe
from lightning_duo.export.trace import Deployed, Inputs, Outputs, has_batch, trace, traced
from lightning_duo.files import plain_float, whole
from lightning_duo.isolation import evaluating, frozen
from lightning_duo.module import DuoModule, DuoOutput
from lightning_duo.tasks import task_state

Format: TypeAlias = Literal["program", "aoti", "onnx"]
SUFFIX = {"program": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
DESCRIPTION = "lightning_duo"  # its key in the metadata; an exported program adds .json


def export_duo(
    module: DuoModule, path: str | Path, example_input: Any, *, format: Format = "program"
) -> Path:
    """Write a duo as one file for any batch size, which needs neither this library nor Lightning.

    The file maps ``x`` to ``(probs, prediction, confidence, accept)`` of `DuoOutput`, in eval mode,
    on the device and in the precision the module has now. A duo of several arguments takes them
    in the file as in the example, by position or by name. The file carries a description of the
    duo, one JSON object: ``temperatures``, ``threshold`` ("Infinity" if nothing is accepted),
    ``mode``, ``task``, ``num_classes`` (2 for labels), ``inputs`` (their shapes and dtypes; null
    stands for the batch), ``outputs`` and ``versions``. To run the file, and to read its
    description:

    - ``program``, which needs PyTorch alone: ``torch.export.load(path).module()(x)``; loading with
      ``extra_files=(extra := {"lightning_duo.json": ""})`` fills in the description.
    - ``aoti``, compiled by AOTInductor for this machine's kind of processor or GPU; on CUDA the
      head is the Triton kernel: ``package = torch._inductor.aoti_load_package(path)``,
      ``package(x)``, ``package.get_metadata()["lightning_duo"]``. Making it needs a C++ compiler.
      It reads ``x`` as it was compiled for, with the example's sizes, dtype and memory layout, and
      does not check that: others give wrong answers.
    - ``onnx``: ``session = onnxruntime.InferenceSession(path)``; outputs have their names, and the
      input is ``x`` where it is one tensor; several arguments have the names they have in the
      base's forward;
      ``session.get_modelmeta().custom_metadata_map["lightning_duo"]``. Making it needs
      ``pip install onnx onnxscript``. Weights of 2 GB and more lie in a second file beside
      it.

    Args:
        module: The duo.
        path: The file to write: ``.pt2``, or ``.onnx``. It appears whole or not at all.
        example_input: A batch as the duo takes it, on the duo's device: a tensor, or tensors in
            lists, tuples and dicts. If the duo takes several arguments, a call with such batches:
            ``Call((ids,), {"mask": mask})`` for ``duo(ids, mask=mask)``; `Call` is in
            `lightning_duo.base`. The first dimension of each tensor is the batch; the other sizes
            stay as they are here.
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
        >>> twice = DuoModule(torch.nn.Bilinear(4, 5, 3), torch.nn.Bilinear(4, 5, 3), (1.0, 0.5))
        >>> example = Call((torch.randn(2, 4), torch.randn(2, 5)), {})
        >>> run = torch.export.load(export_duo(twice, path, example)).module()
        >>> run(torch.ones(7, 4), torch.ones(7, 5))[1].shape
        torch.Size([7])
    """
    path = Path(path)
    _check(module, path, format)
    example = _batch_of_two_or_more(module, example_input)
    precision = torch.autocast(module.temperatures.device.type, enabled=False)  # the weights' own
    with evaluating(module), frozen(module), precision:
        description = _description(module, example)
        program = traced(module, example)
        with whole(path) as file:
            _WRITERS[format](module, program, file, example, description)
    return path


def _write_program(
    duo: DuoModule, program: ExportedProgram, path: Path, inputs: Inputs, description: str
) -> None:
    torch.export.save(program, path, extra_files={f"{DESCRIPTION}.json": description})


def _write_aoti(
    duo: DuoModule, program: ExportedProgram, path: Path, inputs: Inputs, description: str
) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(
        trace(Outputs(duo, operator=True), inputs),
        package_path=str(path),
        inductor_configs={"aot_inductor.metadata": {DESCRIPTION: description}},
    )


def _write_onnx(
    duo: DuoModule, program: ExportedProgram, path: Path, inputs: Inputs, description: str
) -> None:
    # By name: a mapping in last place would be taken for keyword arguments.
    onnx = torch.onnx.export(
        Deployed(Outputs(duo), inputs),
        kwargs=dict(zip(inputs.names, inputs.values, strict=True)),
        dynamic_shapes=inputs.any_batch("batch"),
        output_names=list(DuoOutput._fields),
        dynamo=True,
        verbose=False,
    )
    assert onnx is not None
    onnx.model.metadata_props[DESCRIPTION] = description
    onnx.save(path)


_WRITERS: dict[str, Callable[[DuoModule, ExportedProgram, Path, Inputs, str], None]] = {
    "program": _write_program,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}


def _check(module: DuoModule, path: Path, format: str) -> None:
    if not isinstance(module, DuoModule):
        raise TypeError(f"export_duo exports a DuoModule, got {type(module).__name__}")
    if module.cannot_export:
        raise ValueError(module.cannot_export)
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


def _batch_of_two_or_more(module: DuoModule, example_input: Any) -> Inputs:
    """The example; a batch of one is doubled, as export would take its size for a constant."""
    example = Inputs.of(Call.with_input(example_input), module.base)
    parts = tree_leaves(example.values)
    for part in parts:
        if not isinstance(part, Tensor) and any(nested.leaves(part)):
            raise ValueError(
                f"example_input holds tensors in a {describe(part)}, which torch.export does not "
                "look into; give them in tuples, lists and dicts"
            )
    batched = [x for x in parts if has_batch(x)]
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
    return example.changed(lambda x: torch.cat([x, x])) if sizes == {1} else example


def _description(module: DuoModule, example: Inputs) -> str:
    inputs = [
        {"shape": [None, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
        for x in tree_leaves(example.values)
        if has_batch(x)
    ]
    try:
        base, _ = example.call().of(module.member_logits)
        rows = module.task.rows(base).logits
    except Exception as error:
        raise ValueError(
            f"the duo cannot run example_input, which holds {inputs} (null is the batch): {error}"
        ) from error
    return json.dumps(
        {
            "temperatures": module.temperatures.tolist(),
            "threshold": plain_float(module.threshold.item()),
            "mode": module.mode,
            "task": task_state(module.task),
            "num_classes": rows.shape[1],
            "inputs": inputs,
            "outputs": DuoOutput._fields,
            "versions": {"lightning_duo": __version__, "torch": torch.__version__},
        }
    )
