"""Serve a duo over HTTP, from the one file that `export_duo` wrote.

The server needs LitServe, NumPy, and PyTorch (for duo.pt2) or ONNX Runtime (for duo.onnx). It needs
neither lightning_duo nor the code of the models. docs/serving.md tells how to call it.

pip install '.[serve]' && python examples/serve.py duo.pt2
"""

import argparse
import json
import logging
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias
from zipfile import BadZipFile

import litserve
import numpy as np
from fastapi import Body
from fastapi.responses import JSONResponse
from litserve.loops.simple_loops import BatchedLoop

logger = logging.getLogger(__name__)
Arrays: TypeAlias = dict[str, np.ndarray]
"""By the names of inputs or outputs."""
Loaded: TypeAlias = tuple[dict[str, Any], list[str], Callable[[Arrays], Sequence[np.ndarray]]]
"""Description of a file, names of its inputs, and what runs it."""
# By the kind of NumPy's dtype: which kinds JSON may hold for it, and what to ask for.
_KINDS = {
    "b": ("b", "true or false"),
    "i": ("iu", "whole numbers"),
    "u": ("iu", "whole numbers"),
}


class Input(NamedTuple):
    """An input of the duo, without the batch: a request holds one sample."""

    shape: Sequence[int]
    dtype: str

    @property
    def array_dtype(self) -> np.dtype:
        return np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)  # NumPy lacks it

    def read(self, values: Any) -> np.ndarray:
        """Nested lists of numbers as an array, or a ValueError that says what is wrong."""
        try:
            given = np.array(values)
        except ValueError:
            raise ValueError("its lists differ in length") from None
        if given.shape != tuple(self.shape):
            raise ValueError(f"expected shape {[*self.shape]}, got {[*given.shape]}")
        dtype = self.array_dtype
        kinds, wanted = _KINDS.get(dtype.kind, ("iuf", "numbers"))
        if given.dtype.kind not in kinds:
            raise ValueError(f"expected {wanted}")
        with np.errstate(over="ignore"):
            array = given.astype(dtype)
        if not (np.isfinite(array) if dtype.kind == "f" else array == given).all():
            raise ValueError(f"a value is NaN, infinite or beyond the range of {self.dtype}")
        return array


class Duo(NamedTuple):
    """A duo as the server uses it."""

    inputs: dict[str, Input]
    threshold: float
    run: Callable[[Arrays], Arrays]
    """Batches of all inputs to, among others, prediction and confidence."""


def load_file(path: str, device: str) -> Duo:
    """The duo in a file of `export_duo`, of the format "program" or "onnx"."""
    load = _load_onnx if path.endswith(".onnx") else _load_program
    description, names, run = load(path, device)
    inputs = [Input(x["shape"][1:], x["dtype"]) for x in description["inputs"]]
    if len(names) != len(inputs):
        raise ValueError(f"{path} takes {names}, of which some are no batch of samples")
    return Duo(
        inputs=dict(zip(names, inputs, strict=True)),
        threshold=float(description["threshold"]),
        run=lambda batch: dict(zip(description["outputs"], run(batch), strict=True)),
    )


def _load_program(path: str, device: str) -> Loaded:
    import torch
    from torch.export.passes import move_to_device_pass

    extra = {"lightning_duo.json": ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except (RuntimeError, BadZipFile) as error:
        raise _no_duo(path) from error
    if not extra["lightning_duo.json"]:
        raise _no_duo(path)
    description = json.loads(extra["lightning_duo.json"])
    program = move_to_device_pass(program, device)
    arguments = program.graph_signature.user_inputs  # names of tensors, and constants as they are
    names = [x for x in arguments if isinstance(x, str)]
    dtypes = {
        name: getattr(torch, x["dtype"])
        for name, x in zip(names, description["inputs"], strict=False)
    }
    module, structure = program.module(), program.call_spec.in_spec

    @torch.inference_mode()
    def run(batch: Arrays) -> list[np.ndarray]:
        tensors = {name: torch.from_numpy(x).to(device, dtypes[name]) for name, x in batch.items()}
        args, kwargs = structure.unflatten([tensors.get(x, x) for x in arguments])
        return [y.cpu().numpy() for y in module(*args, **kwargs)]

    return description, names, run


def _load_onnx(path: str, device: str) -> Loaded:
    import onnxruntime

    if device != "cpu":
        raise ValueError("this example runs ONNX on the CPU only; pass --accelerator cpu")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    description = session.get_modelmeta().custom_metadata_map.get("lightning_duo")
    if description is None:
        raise _no_duo(path)
    names = [x.name for x in session.get_inputs()]
    return json.loads(description), names, partial(session.run, None)


def _no_duo(path: str) -> ValueError:
    return ValueError(
        f"{path} does not load as a duo; write it with export_duo, format 'program' or 'onnx', "
        "from a duo on the CPU"
    )


class DuoAPI(litserve.LitAPI):
    """Answers one sample with prediction, confidence and accept.

    LitServe collects requests and hands them to `predict` as one batch. An exception in a method
    would be the answer to all of them, so a request that is wrong travels as its ValueError.

    Args:
        load: Called with a device ("cpu", "cuda:0"), it returns the duo. It is pickled, so it must
            be a function of a module, or a `partial` of one.
        threshold: Lowest confidence to accept, instead of the duo's own.
        **batching: ``max_batch_size``, and ``batch_timeout`` in seconds.
    """

    def __init__(
        self, load: Callable[[str], Duo], threshold: float | None = None, **batching: Any
    ) -> None:
        super().__init__(loop=BatchedLoop(), **batching)  # so that `predict` always gets a list
        if threshold is not None and not (0 <= threshold <= 1 or threshold == math.inf):
            raise ValueError(
                "threshold must be a confidence in [0, 1], or inf to accept nothing, got "
                f"{threshold}"
            )
        self.load, self.threshold = load, threshold

    def setup(self, device: str) -> None:
        self.duo = self.load(device)
        if self.threshold is not None:
            self.duo = self.duo._replace(threshold=self.threshold)
        self._run_ones()  # the first run is slow; only then does /health say ok

    def decode_request(self, request: Annotated[Any, Body()]) -> Arrays | ValueError:
        try:
            return self.sample(request)
        except ValueError as error:
            return error
        except Exception:
            logger.exception("a request could not be read")
            return ValueError("the request cannot be read")

    def sample(self, request: Any) -> Arrays:
        """The inputs that a request holds; a ValueError says what is wrong with it."""
        inputs = self.duo.inputs
        if not isinstance(request, dict) or request.keys() != inputs.keys():
            raise ValueError(
                f"expected a JSON object with {' and '.join(inputs)}, nothing else, and the header "
                "Content-Type: application/json"
            )
        arrays = {}
        for name, wanted in inputs.items():
            try:
                arrays[name] = wanted.read(request[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return arrays

    def predict(self, requests: list[Arrays | ValueError]) -> list[dict[str, Any] | ValueError]:
        answers = iter(self._answers([x for x in requests if not isinstance(x, ValueError)]))
        return [x if isinstance(x, ValueError) else next(answers) for x in requests]

    def encode_response(self, answer: dict[str, Any] | ValueError) -> JSONResponse:
        if isinstance(answer, ValueError):
            return JSONResponse({"detail": str(answer)}, status_code=422)
        return JSONResponse(answer)

    def _answers(self, samples: list[Arrays]) -> list[dict[str, Any] | ValueError]:
        if not samples:
            return []
        batch = {name: np.stack([x[name] for x in samples]) for name in self.duo.inputs}
        try:
            output = self.duo.run(batch)
        except Exception:
            if len(samples) > 1:  # each alone, so that only those at fault fail
                return [answer for x in samples for answer in self._answers([x])]
            self._run_ones()  # raises if the fault is not the sample's: the answer is then a 500
            logger.exception("the duo failed on one request")
            return [ValueError("the duo fails on these values; are they in their usual range?")]
        confidence = output["confidence"]
        columns = {
            "prediction": output["prediction"],
            "confidence": np.where(np.isnan(confidence), None, confidence),  # JSON has no NaN
            "accept": confidence >= self.duo.threshold,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _run_ones(self) -> None:
        inputs = self.duo.inputs.items()
        self.duo.run({name: np.ones((1, *x.shape), x.array_dtype) for name, x in inputs})


def metadata(api: DuoAPI) -> dict[str, Any]:
    """What GET /info tells of the duo. Fails early where it cannot be loaded."""
    duo = api.load("cpu")
    threshold = duo.threshold if api.threshold is None else api.threshold
    if math.isinf(threshold):
        logger.warning("The threshold is infinite: no answer will be accepted.")
    inputs = {name: {"shape": [*x.shape], "dtype": x.dtype} for name, x in duo.inputs.items()}
    return {"inputs": inputs, "threshold": "Infinity" if math.isinf(threshold) else threshold}


def serve(api: DuoAPI, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve until Ctrl+C or SIGTERM; the options are those of `litserve.LitServer`."""
    server = litserve.LitServer(api, model_metadata=metadata(api), **options)
    signal.signal(signal.SIGTERM, stop)
    server.run(host, port, generate_client_file=False)


def stop(*_: Any) -> None:
    """Make SIGTERM a Ctrl+C, as only then LitServe ends its processes too; once is enough."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if multiprocessing.parent_process() is None:
        raise KeyboardInterrupt
    sys.exit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="duo.pt2 (not of AOTInductor) or duo.onnx")
    parser.add_argument("--threshold", type=float, help="confidence to accept; else the duo's own")
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--batch-timeout", type=float, default=0.01, help="seconds to wait")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes on each device")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not Path(options.file).is_file():
        parser.error(f"there is no file {options.file}")

    api = DuoAPI(
        partial(load_file, options.file),
        options.threshold,
        max_batch_size=options.max_batch_size,
        batch_timeout=options.batch_timeout,
    )
    serve(
        api,
        options.host,
        options.port,
        accelerator=options.accelerator,
        devices=options.devices,
        workers_per_device=options.workers,
    )


if __name__ == "__main__":
    main()
