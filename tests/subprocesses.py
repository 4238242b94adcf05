"""What tests run in processes of their own: scripts, the command line, exported duos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_duo import DuoOutput
from lightning_duo.export import Format

TESTS = Path(__file__).parent
# Where a script finds the tests that it calls.
PATHS = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'callback')!r}]\n"
FIELDS = DuoOutput._fields

MODELS = """
from torch import nn
from torchvision.transforms import v2
from lightning_duo.zoo import build_sidekick

class Base(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 7))

class Wide(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 7)

def sidekick():
    return nn.Sequential(v2.Resize(24), build_sidekick("resnet10t", 7, pretrained=False))

def number():
    return 7

def broken():
    return {}["weights"]
"""


def lightning_duo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("lightning-duo"))
    return subprocess.run(
        [command, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def two_processes(call: str, folder: Path, port: int) -> list:
    """What a call, such as ``test_metrics.everything(rank, 2)``, returns in each of two processes.

    They are started as torchrun does; the call may use ``rank`` and ``folder``.
    """
    script = f"""{PATHS}
import json, os, pathlib, {call.partition(".")[0]}
rank, folder = int(os.environ["RANK"]), pathlib.Path({str(folder)!r})
(folder / f"{{rank}}.json").write_text(json.dumps({call}))
"""
    environment = {
        # Lightning reseeds every process with a global seed it finds here.
        **{k: v for k, v in os.environ.items() if k != "PL_GLOBAL_SEED"},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + (os.getpid() + port) % 2000),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


RUN = """
import json, sys
for name in ("lightning_duo", "lightning_duo_kernels", "lightning", "timm", "torchmetrics"):
    sys.modules[name] = None  # importing it is an error
import numpy as np
format, file, inputs, outputs, *by_name = sys.argv[1:]
if format == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    description = json.loads(session.get_modelmeta().custom_metadata_map["lightning_duo"])
    given, names = ([x.name for x in get()] for get in (session.get_inputs, session.get_outputs))
    assert names == description["outputs"], names
    assert all(x.shape[0] == "batch" for x in session.get_inputs())
    assert not by_name or given == by_name, given
    run = lambda xs: session.run(None, dict(zip(given, xs, strict=True)))
else:
    import torch
    if format == "program":
        extra = {"lightning_duo.json": ""}
        module = torch.export.load(file, extra_files=extra).module()
        description = json.loads(extra["lightning_duo.json"])
    else:
        module = torch._inductor.aoti_load_package(file)
        description = json.loads(module.get_metadata()["lightning_duo"])

    def run(xs):
        first, *rest = map(torch.from_numpy, xs)
        named = dict(zip(by_name[1:], rest, strict=True)) if by_name else {}
        return [y.detach().cpu().numpy() for y in module(first, **named)]
batches = {}
for key, x in np.load(inputs).items():
    batches.setdefault(key.partition("/")[0], []).append(x)
results = {}
for key, xs in batches.items():
    for field, value in zip(description["outputs"], run(xs), strict=True):
        results[f"{key}.{field}"] = value
np.savez(outputs, description=json.dumps(description), **results)
"""


def run_file(
    path: Path, format: Format, batches: dict[str, Tensor | dict[str, Tensor]]
) -> tuple[dict, dict]:
    """Results by batch, and the description, of an exported duo in a process of its own.

    A batch of several arguments is a dict: the first goes by position, the others by name.
    """
    inputs, outputs = path.with_name("inputs.npz"), path.with_name("outputs.npz")
    parts = {name: x if isinstance(x, dict) else {"x": x} for name, x in batches.items()}
    arrays = {f"{name}/{key}": x.numpy() for name, p in parts.items() for key, x in p.items()}
    np.savez(inputs, **arrays)
    keys = list(next(iter(parts.values())))
    by_name = keys if len(keys) > 1 else []
    files = [str(path), str(inputs), str(outputs)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, format, *files, *by_name],
        capture_output=True,
        text=True,
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = dict(np.load(outputs).items())
    description = json.loads(str(found.pop("description")))
    results = {
        name: DuoOutput(*(torch.from_numpy(found[f"{name}.{field}"]) for field in FIELDS))
        for name in batches
    }
    return results, description


def assert_same(mine: DuoOutput, theirs: DuoOutput) -> None:
    for field, x, y in zip(FIELDS, mine, theirs, strict=True):
        assert x.dtype == y.dtype, field
        if x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5, equal_nan=True, msg=field)
        else:
            assert torch.equal(x, y), field
