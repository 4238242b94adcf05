"""The Triton kernels without a GPU: interpreted, captured, and what they read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", ["test_head.py", "test_nll.py"])
def test_the_kernel_passes_the_tests_under_the_interpreter(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", str(HERE / file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]


CAPTURE = """
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
import lightning_duo_kernels

def head(a, b, t):
    return torch.ops.lightning_duo.head(a, b, t, True, False)

for classes in (10, 1000, 21841):
    with FakeTensorMode():
        a = torch.empty(7, classes, device="cuda", dtype=torch.bfloat16)
        t = torch.empty(2, device="cuda")
        graph = make_fx(dispatch_functionalize(head))(a, a, t).graph  # as torch.compile does
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    print([call for call in calls if "empty" not in call])
"""


def test_cuda_tensors_take_the_kernel_in_a_single_launch() -> None:
    # Fake tensors: no GPU is needed to see which path CUDA takes.
    for line in run(CAPTURE, TRITON_INTERPRET="0").splitlines():
        assert line.count("triton_kernel_wrapper") == 1, line
        assert "aten" not in line.replace("getitem", ""), line


READS = """
import collections, sys, numpy, torch
from triton.runtime import interpreter
from lightning_duo_kernels.head_triton import launch_head

reads = collections.Counter()
load = interpreter.InterpreterBuilder.create_masked_load
def counted(self, ptrs, mask, *rest):
    reads.update(numpy.asarray(ptrs.data)[numpy.asarray(mask.data).astype(bool)].tolist())
    return load(self, ptrs, mask, *rest)
interpreter.InterpreterBuilder.create_masked_load = counted

rows, t = 3, torch.tensor([1.0, 0.5])
for classes in (5, 10, 257, 1000, 1001, 16384, 16387, 20000):
    for dtype in (torch.float32, torch.bfloat16):
        for probs in (True, False):
            a, b = torch.randn(2, rows, classes).to(dtype)
            reads.clear()
            launch_head(a, b, t, probs, False)
            for x in (a, b):
                size, start = x.element_size(), x.data_ptr()
                own = [reads[start + i * size] for i in range(x.numel())]
                # What a granule holds of the neighbouring row is read with it.
                shared = sum(own) / len(own) - min(own)
                print(classes, int(probs), min(own), shared)
            inside = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (a, b)]
            outside = [p for p in reads if not any(p in r for r in inside)]
            assert len(outside) <= 2, outside  # the two temperatures
"""


def test_logits_are_read_once_and_nothing_beyond_them() -> None:
    lines = run(READS, TRITON_INTERPRET="1").splitlines()
    assert len(lines) == 8 * 2 * 2 * 2
    for line in lines:
        classes, probs, reads, shared = (float(word) for word in line.split())
        assert reads == (2 if classes > 16384 and probs else 1), line
        assert shared <= 14 / classes, line


def test_without_triton_the_head_runs_in_plain_pytorch() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('triton') else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from lightning_duo_kernels import duo_head\n"
        "x = torch.randn(3, 5, requires_grad=True)\n"
        "head = duo_head(x, x, torch.ones(2)); head.confidence.sum().backward()\n"
        "print(torch.allclose(head.probs, (2 * x).softmax(1)), x.grad.shape)"
    )
    assert run(code).strip() == "True torch.Size([3, 5])"
