"""Small duos for the example that serves them, and servers in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_duo import DuoModule

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds in which a server starts or answers, on the busiest machine
WORDS, LENGTH = 10, 5


class Reader(nn.Module):
    """Fails on token ids from `WORDS` on."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return 3 * self.head((self.words(ids) * mask[..., None]).sum(1))


class Pixels(nn.Module):
    """Bytes (N, 2, 2, 2) to the logits of three classes for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.float() / 255)


class Powers(nn.Module):
    """One logit a sample, from a tensor and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, power: int) -> Tensor:
        return self.head(x**power).squeeze(1)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    return ids, (torch.rand(ids.shape, generator=generator) < 0.7).float()


def pair(model: Callable[[], nn.Module], **options: Any) -> DuoModule:
    torch.manual_seed(0)
    return DuoModule(model(), model(), (1.0, 0.5), **options).eval()


def reader() -> DuoModule:
    """A duo that accepts about half of `tokens`."""
    return pair(Reader, threshold=0.7)


def told(duo: DuoModule, *inputs: Any) -> list[dict[str, Any]]:
    """What the duo itself says of each sample."""
    with torch.inference_mode():
        output = duo(*inputs)._asdict()
    fields = ("prediction", "confidence", "accept")
    rows = zip(*(output[name].tolist() for name in fields), strict=True)
    return [dict(zip(fields, row, strict=True)) for row in rows]


def assert_told(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        assert list(answer) == ["prediction", "confidence", "accept"]
        assert answer["prediction"] == wanted["prediction"]
        assert answer["accept"] == wanted["accept"]
        np.testing.assert_allclose(answer["confidence"], wanted["confidence"], atol=1e-5)


class Server(NamedTuple):
    port: int
    log: Path

    def send(self, body: bytes, method: str = "POST", path: str = "/predict") -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        return self.send(b"", "GET", path)

    def ask(self, request: Any) -> tuple[int, Any]:
        status, body = self.send(json.dumps(request).encode())
        return status, json.loads(body)

    def ask_at_once(self, requests: list[Any]) -> list[tuple[int, Any]]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self.ask, requests))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(folder: Path, *command: object, port: int, paths: list[Path]) -> Iterator[Server]:
    """A server in processes of its own, which SIGTERM ends."""
    server = Server(port, folder / "log")
    with open(server.log, "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "OMP_NUM_THREADS": "1",
                "LIT_SERVER_API_KEY": "",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: ready(server, process))
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, server.log.read_text()[-3000:]
        wait_until(lambda: not alive(process))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(true: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not true():
        assert time.monotonic() < deadline, "it takes too long"
        pause.wait(0.05)


def ready(server: Server, process: subprocess.Popen) -> bool:
    assert process.poll() is None, server.log.read_text()[-3000:]
    with suppress(OSError):
        return server.get("/health") == (200, b"ok")
    return False


def alive(process: subprocess.Popen) -> bool:
    """Whether any process of the server's group is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        return True
    return False


def without(folder: Path, *modules: str) -> Path:
    """Where the search for modules begins, so that importing these is an error."""
    for name in modules:
        (folder / "absent" / name).mkdir(parents=True)
        text = f"raise ImportError('{name} is not installed')"
        (folder / "absent" / name / "__init__.py").write_text(text)
    return folder / "absent"
