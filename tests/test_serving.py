"""The example that serves a duo, called over HTTP as its page says."""

import base64
import io
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from served import (
    LENGTH,
    ROOT,
    WORDS,
    Server,
    assert_told,
    free_port,
    pair,
    reader,
    serving,
    tokens,
    told,
    without,
)
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from lightning_duo import DuoModule
from lightning_duo.base import Call
from lightning_duo.export import export_duo
from lightning_duo.tasks import Labels

pytestmark = pytest.mark.skipif(not find_spec("litserve"), reason="needs lightning-duo[serve]")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("program"), free_port()
    path = export_duo(reader(), folder / "duo.pt2", Call(tokens(2), {}))
    absent = without(folder, "lightning_duo", "lightning_duo_kernels", "lightning", "timm")
    command = (ROOT / "examples" / "serve.py", path, "--port", port, "--batch-timeout", 0.05)
    with serving(folder, *command, port=port, paths=[absent]) as server:
        yield server


def samples(ids: Tensor, mask: Tensor) -> list[dict[str, Any]]:
    return [{"ids": i.tolist(), "mask": m.tolist()} for i, m in zip(ids, mask, strict=True)]


GOOD = {"ids": [1] * LENGTH, "mask": [1.0] * LENGTH}
BAD: dict[str, tuple[Any, str]] = {
    "another shape": ({**GOOD, "ids": [1, 2]}, "ids: expected shape [5], got [2]"),
    "a batch": ({**GOOD, "ids": [GOOD["ids"]]}, "ids: expected shape [5], got [1, 5]"),
    "ragged": ({**GOOD, "ids": [1, 2, 3, 4, [5]]}, "ids: its lists differ in length"),
    "text": ({**GOOD, "mask": [1, 1, 1, 1, "1"]}, "mask: expected numbers"),
    "null": ({**GOOD, "mask": [1, 1, 1, 1, None]}, "mask: expected numbers"),
    "NaN": ({**GOOD, "mask": [1, 1, 1, 1, float("nan")]}, "mask: a value is NaN, infinite"),
    "infinite": ({**GOOD, "mask": [1, 1, 1, 1, float("inf")]}, "mask: a value is NaN, infinite"),
    "beyond float32": ({**GOOD, "mask": [1, 1, 1, 1, 1e39]}, "beyond the range of float32"),
    "a fraction": ({**GOOD, "ids": [1, 2, 3, 4, 5.5]}, "ids: expected whole numbers"),
    "an input is missing": ({"ids": GOOD["ids"]}, "expected a JSON object with ids and mask"),
    "one more": ({**GOOD, "more": 1}, "expected a JSON object with ids and mask"),
    "no object": ([1, 2], "expected a JSON object with ids and mask"),
    "NaN alone": (float("nan"), "expected a JSON object with ids and mask"),
    "outside the vocabulary": ({**GOOD, "ids": [1, 2, 3, 4, WORDS]}, "the duo fails on these"),
}


def test_one_request_is_answered_as_by_the_duo(program: Server) -> None:
    ids, mask = tokens(4, seed=1)
    found = [program.ask(request) for request in samples(ids, mask)]
    assert {status for status, _ in found} == {200}
    assert_told([answer for _, answer in found], told(reader(), ids, mask))


def test_info_tells_what_to_send_and_the_threshold(program: Server) -> None:
    status, body = program.get("/info")
    assert status == 200
    assert json.loads(body)["model"] == {
        "inputs": {
            "ids": {"shape": [LENGTH], "dtype": "int64"},
            "mask": {"shape": [LENGTH], "dtype": "float32"},
        },
        "threshold": reader().threshold.item(),
    }


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_request_is_told_what_is_wrong(program: Server, case: str) -> None:
    request, detail = BAD[case]
    status, answer = program.ask(request)
    assert status == 422
    assert detail in answer["detail"]


@pytest.mark.parametrize("body", [b"", b'{"ids":', b"\xff\xfe", b"[" * 50_000, b'"ids"', b"null"])
def test_what_is_no_request_is_no_error_of_the_server(program: Server, body: bytes) -> None:
    status, answer = program.send(body)
    assert status in (400, 422)
    assert json.loads(answer)["detail"]


def test_wrong_requests_do_not_spoil_the_others_of_a_batch(program: Server) -> None:
    ids, mask = tokens(24, seed=2)
    expected, good, wrong = told(reader(), ids, mask), samples(ids, mask), list(BAD.values())
    assert {answer["accept"] for answer in expected} == {True, False}
    mixed = [x for pair in zip(good, [w for w, _ in wrong] * 2, strict=False) for x in pair]
    found = program.ask_at_once(mixed)
    assert [status for status, _ in found] == [200, 422] * len(good)
    assert_told([answer for _, answer in found[::2]], expected)
    for (_, answer), (_, detail) in zip(found[1::2], wrong * 2, strict=False):
        assert detail in answer["detail"]


def test_onnx_needs_no_torch_and_takes_another_threshold(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    duo, port = pair(lambda: nn.Linear(4, 3), task=Labels(), threshold=1.0), free_port()
    path = export_duo(duo, tmp_path / "duo.onnx", torch.ones(2, 4), format="onnx")
    absent = without(tmp_path, "lightning_duo", "lightning_duo_kernels", "lightning", "torch")
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    duo.threshold.fill_(0.75)
    assert 0 < duo(x).accept.float().mean() < 1
    options = ("--threshold", 0.75, "--workers", 2, "--accelerator", "cpu")
    command = (ROOT / "examples" / "serve.py", path, "--port", port, *options)
    with serving(tmp_path, *command, port=port, paths=[absent]) as server:
        found = server.ask_at_once([{"x": row} for row in x.tolist()])
        assert {status for status, _ in found} == {200}
        assert_told([answer for _, answer in found], told(duo, x))
        _, info = server.get("/info")
        assert json.loads(info)["model"]["threshold"] == 0.75


MODELS = """
from torch import nn

class Base(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))

Sidekick = Base
"""
# The page's classes together; what LitServe gives to `predict` goes into the log.
TOGETHER = """
class Both(Images, Logged):
    def predict(self, requests):
        print("batch of", len(requests), flush=True)
        return super().predict(requests)
"""


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def test_the_page_as_it_is_serves_images_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    port = free_port()
    *classes, last = [block for block in blocks if "from serve import" in block]
    last = last.replace("8000", str(port)).replace("DuoAPI(load", "Both(load")
    script = tmp_path / "my_server.py"
    script.write_text("\n".join([*classes, TOGETHER, last.replace("0.01", "0.5")]))
    (tmp_path / "my_models.py").write_text(MODELS)
    models = import_models(tmp_path / "my_models.py")
    torch.manual_seed(0)
    duo = DuoModule(models["Base"](), models["Sidekick"](), (1.0, 0.5), threshold=0.5).eval()
    duo.save(tmp_path / "duo.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    images = torch.stack([pil_to_tensor(Image.fromarray(x)) for x in pixels]).float() / 255
    expected = told(duo, images)

    paths = [ROOT / "examples", ROOT, ROOT / "kernels"]
    with serving(tmp_path, script, port=port, paths=paths) as server:
        found = server.ask_at_once([{"image": png(x)} for x in pixels])
        assert {status for status, _ in found} == {200}
        assert_told([answer for _, answer in found], expected)
        wrong = server.ask_at_once([{"image": "no image"}, {}, 7])
        assert {status for status, _ in wrong} == {422}

        client = next(block for block in blocks if "urlopen" in block)
        names: dict[str, Any] = {}
        monkeypatch.setenv("no_proxy", "*")
        exec(client.partition("answer = ask(")[0].replace("8000", str(port)), names)
        assert_told([names["ask"](image=png(pixels[0]))], expected[:1])

    log = server.log.read_text()
    assert max(int(n) for n in re.findall(r"^batch of (\d+)$", log, re.MULTILINE)) > 1
    logged = [json.loads(line) for line in log.splitlines() if line.startswith('{"')]
    assert sum("prediction" in line for line in logged) == 13
    assert sum("error" in line for line in logged) == 3


def import_models(path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(path.read_text(), names)
    return names
