"""What the example that serves a duo answers to requests that come as one batch, without HTTP."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from served import Pixels, Powers, assert_told, pair, reader, tokens, told
from torch import Tensor, nn

from lightning_duo import DuoModule
from lightning_duo.base import Call
from lightning_duo.export import export_duo
from lightning_duo.tasks import Labels

pytest.importorskip("litserve")
serve = import_module("serve")


def replies(api: Any, requests: list[Any]) -> list[tuple[int, Any]]:
    """Status and answer of requests that come as one batch."""
    found = api.predict([api.decode_request(request) for request in requests])
    encoded = [api.encode_response(answer) for answer in found]
    return [(x.status_code, json.loads(x.body)) for x in encoded]


def api_of(path: Path, threshold: float | None = None) -> Any:
    api = serve.DuoAPI(partial(serve.load_file, str(path)), threshold)
    api.setup("cpu")
    return api


HEADS: dict[str, tuple[DuoModule, tuple[Any, ...]]] = {
    "classes of two inputs": (reader(), tokens(5)),
    "labels": (
        pair(lambda: nn.Linear(4, 3), task=Labels(), threshold=0.6),
        (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),),
    ),
    "one label, and a constant": (pair(Powers, task=Labels()), (torch.ones(5, 4), 2)),
    "pixels of bytes": (
        pair(Pixels, threshold=0.5),
        (torch.arange(40, dtype=torch.uint8).view(5, 2, 2, 2),),
    ),
    "nothing accepted": (pair(lambda: nn.Linear(4, 3), threshold=torch.inf), (torch.ones(5, 4),)),
}


@pytest.mark.parametrize(
    ("head", "format"),
    [*((head, "program") for head in HEADS), ("labels", "onnx"), ("pixels of bytes", "onnx")],
)
def test_every_head_is_answered_as_by_the_duo(head: str, format: str, tmp_path: Path) -> None:
    duo, inputs = HEADS[head]
    path = tmp_path / ("duo.onnx" if format == "onnx" else "duo.pt2")
    api = api_of(export_duo(duo, path, Call(inputs, {}), format=format))
    batches = [x.tolist() for x in inputs if isinstance(x, Tensor)]
    requests = [
        dict(zip(api.duo.inputs, sample, strict=True)) for sample in zip(*batches, strict=True)
    ]
    found = replies(api, requests)
    assert {status for status, _ in found} == {200}
    assert_told([answer for _, answer in found], told(duo, *inputs))
    json.dumps(serve.metadata(api), allow_nan=False)


def test_arguments_by_name_are_served(tmp_path: Path) -> None:
    ids, mask = tokens(5)
    path = export_duo(reader(), tmp_path / "duo.pt2", Call((ids,), {"mask": mask}))
    requests = [{"mask": m, "ids": i} for i, m in zip(ids.tolist(), mask.tolist(), strict=True)]
    found = replies(api_of(path), requests)
    assert_told([answer for _, answer in found], told(reader(), ids, mask))


def test_what_overflows_is_not_accepted(tmp_path: Path) -> None:
    duo = pair(lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.BatchNorm1d(3)))
    duo.base[0].weight.data.fill_(100.0)
    path = export_duo(duo, tmp_path / "duo.pt2", torch.ones(2, 4))
    (_, large), (_, usual) = replies(api_of(path), [{"x": [3e38] * 4}, {"x": [1.0] * 4}])
    assert large["confidence"] is None
    assert large["accept"] is False
    assert_told([usual], told(duo, torch.ones(1, 4)))


def test_files_of_others_and_wrong_thresholds_are_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "a.pt2")
    (tmp_path / "b.pt2").write_bytes(b"no archive")
    for name in ("a.pt2", "b.pt2"):
        with pytest.raises(ValueError, match="write it with export_duo"):
            serve.load_file(str(tmp_path / name), "cpu")
    with pytest.raises(ValueError, match="confidence in"):
        serve.DuoAPI(serve.load_file, threshold=90)


def test_a_fault_that_is_not_the_requests_is_none_of_it() -> None:
    calls = []

    def load(device: str) -> Any:
        def run(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            calls.append(batch)
            if len(calls) > 1:  # the first is that of the start
                raise RuntimeError("the device is gone")
            return {"prediction": np.zeros(1, int), "confidence": np.ones(1)}

        return serve.Duo({"x": serve.Input((), "float32")}, 0.0, run)

    api = serve.DuoAPI(load)
    api.setup("cpu")
    with pytest.raises(RuntimeError, match="the device is gone"):
        replies(api, [{"x": 1.0}])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=1), x, max_size=2),
    max_leaves=6,
) | st.lists(st.integers(-300, 300) | st.booleans() | st.floats(width=16), min_size=2, max_size=2)


@given(json_values, st.sampled_from(["float32", "float16", "bfloat16", "int64", "uint8", "bool"]))
def test_values_are_taken_as_they_are_or_refused(values: Any, dtype: str) -> None:
    wanted = serve.Input((2,), dtype)
    try:
        array = wanted.read(values)
    except ValueError:
        plain = isinstance(values, list) and [type(x) for x in values] in ([int] * 2, [float] * 2)
        if plain and dtype == "float32":  # refused only with a reason
            assert not all(abs(x) <= torch.finfo(torch.float32).max for x in values)
        return
    assert array.shape == (2,)
    assert np.isfinite(array).all()
    exact = array.dtype.kind != "f"
    tolerance = 0 if exact else float(np.finfo(array.dtype).resolution)
    np.testing.assert_allclose(
        array.astype(float), [float(x) for x in values], rtol=tolerance, atol=tolerance
    )
