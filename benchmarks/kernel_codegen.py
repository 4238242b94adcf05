"""What the compilers make of the Triton kernels, on a machine without a GPU.

    python benchmarks/kernel_codegen.py [--target sm_90 ...] [--classes 1000 ...] [--json [FILE]]

Every launch goes through the library's own launcher, on meta tensors (aligned, without data), and
through Triton's own JIT, which specialises and compiles it as it would on the target; only the
launch itself is left out. Registers and numbers of instructions are proxies: they say what may be
slow, not how fast anything is.

- registers, stack, spills: per thread, the last two in bytes. Spills are what is stored to local
  memory (NVIDIA), or four bytes for each vector register that is reported as spilled (AMD). After
  a plus: scalar registers that are kept in lanes of vector registers, not in memory (AMD).
- loads: global loads that read the program's tile of logits, as number x bits. These are all loads
  in the machine code except for the other ones.
- other: loads of anything else, told by the line of the source that a load has in LLVM's output.
  The head's are the temperatures and, element by element, the granule (see the kernel) in which a
  tensor ends; only the last programs run the latter. Scalar loads (AMD) are not counted.
- per logit: what all threads load with the loads above, over what the tile holds. The body of a
  loop counts once, and is one tile; every load counts as if it ran; threads that load the same
  logit count each, though memory is read once. It is below 1 where the compiler drops loads that
  lie behind the end of every row.
- stores: all global stores in the machine code.
"""

import argparse
import itertools
import json
import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch._library.triton import set_wrap_triton_enabled
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lightning_duo_kernels.head_triton import launch_head
from lightning_duo_kernels.nll_triton import launch_nll

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CLASSES = (10, 257, 1000, 1001, 16001, 16384, 21841, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 1024

FILE = re.compile(r'\s\.file\s+(\d+) "(.*?)"(?: "(.*)")?')
LINE = re.compile(r"\s\.loc\s+(\d+) (\d+)")
SASS = re.compile(r"\b(LD|ST)G(?:STS)?((?:\.\w+)*) ")
PTX = re.compile(r"\b(ld|st)\.global((?:\.\w+)*) ")
GCN = re.compile(r"\s(?:buffer|global|flat)_(lo|st)\w*?_([a-z]\w+) ")
WIDTHS = {"256": 256, "128": 128, "x4": 128, "x3": 96, "x2": 64, "64": 64}
WIDTHS |= {"short": 16, "16": 16, "byte": 8, "8": 8}


@dataclass(frozen=True)
class Launch:
    """A launch to compile, and how to read its code."""

    labels: dict[str, Any]
    """Says which one it is: kernel, classes, stride (between two rows) and variant."""
    start: Callable[[], Any]
    """Calls the launcher."""
    tile: str
    """Pattern of the lines in the source that load a tile of logits."""
    dtype: torch.dtype
    """Of the logits."""


def head_launches(classes: Sequence[int]) -> Iterator[Launch]:
    """The duo head: all outputs, and 1000 classes in rows that are padded."""
    temperatures = torch.empty(2, device="meta")
    variants = ("probs", "no probs", "uq, probs", "uq, no probs")
    for count, dtype, variant in itertools.product(classes, DTYPES, variants):
        for stride in (1000, 1001, 1024) if (count, variant) == (1000, "probs") else (count,):
            logits = torch.empty(ROWS, stride, dtype=dtype, device="meta")[:, :count]
            flags = "no" not in variant, "uq" in variant
            yield Launch(
                {"kernel": "head", "classes": count, "stride": stride, "variant": variant},
                start=partial(launch_head, logits, logits, temperatures, *flags),
                tile=r"tl\.load\(logits \+ start \+ lanes",
                dtype=dtype,
            )


def nll_launches(classes: Sequence[int]) -> Iterator[Launch]:
    """A pass of the temperature fit, at as few and as many points as it asks for."""
    targets = torch.empty(ROWS, dtype=torch.int64, device="meta")
    for count, dtype, points in itertools.product(classes, DTYPES, (3, 9)):
        logits = torch.empty(ROWS, count, dtype=dtype, device="meta")
        yield Launch(
            {"kernel": "nll", "classes": count, "stride": count, "variant": f"{points} points"},
            start=partial(launch_nll, logits, logits, targets, [(1.0, 1.0)] * points),
            tile=r"tl\.load\((base|sidekick) \+ column",
            dtype=dtype,
        )


KERNELS = {"head": head_launches, "nll": nll_launches}


@dataclass(frozen=True)
class NoDevice:
    """As much of a Triton driver as compiling takes."""

    target: GPUTarget

    def get_current_device(self) -> GPUTarget:
        """What Triton keeps its compiled kernels by."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> None:
        """Nothing runs."""

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return self.target


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel that the launcher would run on this target."""
    kernels = []

    def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        run = partial(kernel.run, grid=grid, warmup=True)
        return lambda *args, **kwargs: kernels.append(run(*args, **kwargs))

    triton.runtime.driver.set_active(NoDevice(target))
    hip = "7.0" if target.backend == "hip" else None  # the launcher looks whether there is one
    with (
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(JITFunction, "__getitem__", compile_only),
        set_wrap_triton_enabled(False),
    ):
        launch.start()
    return kernels[-1]


def tool(name: str, *arguments: str) -> str:
    """Output of a tool that comes with Triton."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def bits(suffix: str) -> int:
    """Bits per thread of a load or store in machine code."""
    return next((width for ending, width in WIDTHS.items() if ending in suffix), 32)


def machine_code(kernel: Any) -> tuple[Counter[int], Counter[int], dict[str, int]]:
    """Global loads and stores by width; and registers, stack and spills."""
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        accesses = GCN.findall(code)
        found = {name: int(n) for name, n in re.findall(r"^ +\.(\w+): +(\d+)$", code, re.M)}
        registers, stack = found["vgpr_count"], found["private_segment_fixed_size"]
        spills, parked = 4 * found["vgpr_spill_count"], found["sgpr_spill_count"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            code = tool("cuobjdump", "-sass", file.name)
            resources = tool("cuobjdump", "-res-usage", file.name)
        accesses = SASS.findall(code)
        found = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", resources)}
        registers, stack, parked = found["REG"], found["STACK"], 0
        spills = sum(bits(s) // 8 for s in re.findall(r"\bSTL((?:\.\w+)*) ", code))
    loads = Counter(bits(suffix) for kind, suffix in accesses if kind[0] in "Ll")
    stores = Counter(bits(suffix) for kind, suffix in accesses if kind[0] in "Ss")
    usage = {"registers": registers, "stack": stack, "spills": spills, "parked": parked}
    return loads, stores, usage


def listed_loads(kernel: Any) -> Iterator[tuple[int, str]]:
    """Bits per thread, and the line of the source, of each global load in LLVM's listing."""
    listing = kernel.asm.get("amdgcn", kernel.asm.get("ptx"))
    files = {number: str(Path(*parts)) for number, *parts in FILE.findall(listing)}
    source, frozen = "", False
    for line in listing.splitlines():
        if "inline asm" in line:  # in which LLVM counts the lines on
            frozen = "begin" in line
        elif (found := LINE.match(line)) and not frozen:
            source = linecache.getline(files[found[1]], int(found[2]))
        elif (found := GCN.match(line)) and found[1] == "lo":
            yield bits(found[2]), source
        elif (found := PTX.search(line)) and found[1] == "ld":
            vector, scalar = re.search(r"\.v(\d)", found[2]), re.search(r"\.[bfsu](\d+)", found[2])
            yield int(vector[1] if vector else 1) * int(scalar[1]), source


def examined(launch: Launch, name: str, kernel: Any) -> dict[str, Any]:
    """One line of the report."""
    arguments = kernel.src.fn.arg_names
    constants = {arguments[i]: value for (i,), value in kernel.src.constants.items()}
    loads, stores, usage = machine_code(kernel)
    other = Counter(w for w, source in listed_loads(kernel) if not re.search(launch.tile, source))
    loads -= other
    tile = 2 * constants["BLOCK"] * constants.get("ROWS", 1)
    loaded = sum(loads.elements()) / 8 * kernel.metadata.num_warps * TARGETS[name].warp_size
    return {
        "target": name,
        **launch.labels,
        "dtype": str(launch.dtype).removeprefix("torch."),
        "function": kernel.src.fn.__name__,
        "constants": {key: value for key, value in constants.items() if key.isupper()},
        "warps": kernel.metadata.num_warps,
        **usage,
        "shared": kernel.metadata.shared,
        "loads": dict(loads),
        "other": other.total(),
        "bytes_per_logit": loaded / tile,
        "loads_per_logit": loaded / tile / launch.dtype.itemsize,
        "stores": dict(stores),
    }


def report(asked: Iterable[tuple[Launch, str]]) -> list[dict[str, Any]]:
    """Compile launches for their targets, and disassemble some while others compile."""
    with ThreadPoolExecutor(2) as pool:
        tasks = [
            pool.submit(examined, launch, name, compiled(launch, TARGETS[name]))
            for launch, name in asked
        ]
        return [task.result() for task in tasks]


def show(records: list[dict[str, Any]], console: Console) -> None:
    """Print one table for each kernel and target."""
    plain = ("variant", "warps", "registers", "stack", "spills", "shared")
    headings = ("K", "dtype", *plain, "tile", "loads", "other", "per logit", "stores")
    for (kernel, target), group in itertools.groupby(records, lambda r: (r["kernel"], r["target"])):
        table = Table(*headings, title=f"{kernel}, {target}")
        for record in group:
            constants, classes, stride = (record[k] for k in ("constants", "classes", "stride"))
            if record["parked"]:
                record = {**record, "spills": f"{record['spills']} +{record['parked']}"}
            loads, stores = (
                " ".join(f"{n}x{width}" for width, n in sorted(record[kind].items(), reverse=True))
                for kind in ("loads", "stores")
            )
            table.add_row(
                str(classes) if classes == stride else f"{classes} of {stride}",
                record["dtype"],
                *(str(record[name]) for name in plain),
                f"{constants.get('ROWS', 1)}x{constants['BLOCK']}",
                loads,
                str(record["other"]),
                f"{record['loads_per_logit']:g} ({record['bytes_per_logit']:g} B)",
                stores,
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument("--json", nargs="?", const="-", help="JSON, here or into a file as well")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that Triton compiles nothing; unset it")
    records = report(
        (launch, target)
        for kernel, target in itertools.product(options.kernel, options.target)
        for launch in KERNELS[kernel](options.classes)
    )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if options.json == "-":
        print(lines, end="")
    else:
        show(records, Console(width=150))
        if options.json:
            Path(options.json).write_text(lines)


if __name__ == "__main__":
    main()
