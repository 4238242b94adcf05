"""What training costs with the callback, beside training the base and the sidekick one by one.

    python benchmarks/bench_cofinetune.py [--quick] [--device cuda] [--ranks 1 2 4]

Every run is a `Trainer.fit` of one epoch with its validation: JPEG files of 500 x 375 pixels are
decoded and augmented (random crop, flip, RandAugment), and with the callback the temperatures are
fitted and the metrics computed. The clock starts at the second training batch, when models are
built and warm, as a short run would else be mostly set-up, which one run saves too. The sidekick
alone is trained as the callback trains it, all layers with AdamW. "data" only reads the loaders.
One run saves one reading of the data, so the least that can be expected is (base + sidekick - data)
over (base + sidekick): the column "ideal".

Bookkeeping is what the callback itself takes of a step of the base: its hooks, with a sidekick of
one parameter, less a plain loop that trains the same sidekick.

With --ranks the runs are also made with as many processes as data-parallel training would have,
each with one thread and its own batches of the same size (gloo on the CPU). Beyond the number of
cores they share these, and the times say how a machine copes that is too small.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import timm
import torch
from harness import Growth, Options, Row, parser, run
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lightning_duo import DuoCallback
from lightning_duo.cost import Spread, Timing, environment, peak_memory

CLASSES = 20
WIDTH, HEIGHT = 500, 375  # of a file, as usual in ImageNet


class Case(NamedTuple):
    """Models and sizes of one comparison."""

    base: str
    sidekick: str
    pixels: int
    batch: int
    steps: int


SMALL = Case("resnet18", "resnet10t", 64, 16, 10)
CASES = (
    *(SMALL._replace(batch=batch) for batch in (8, 16, 32)),
    Case("mobilenetv3_large_100", "mobilenetv3_small_050", 64, 16, 10),
    Case("resnet50", "resnet18", 128, 8, 4),
)
GROWTH = (
    Growth("batch", {"part": "fit", "base": "resnet18"}, ("ms", "peak_mb")),
    Growth("ranks", {"part": "ranks"}, ("ms",)),
    Growth("batch", {"part": "bookkeeping"}),
)


def write_files(folder: Path, count: int) -> list[Path]:
    """JPEG files cut from two photographs that scikit-learn carries, a class in each name."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    photographs = [
        torch.from_numpy(image).permute(2, 0, 1) for image in load_sample_images().images
    ]
    files = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        cut = v2.functional.resized_crop(
            photograph,
            *(int(torch.randint(60, (), generator=generator)) for _ in range(2)),
            *(int(torch.randint(200, 360, (), generator=generator)) for _ in range(2)),
            [HEIGHT, WIDTH],
        )
        files.append(folder / f"{number % CLASSES}_{number}.jpg")
        Image.fromarray(cut.permute(1, 2, 0).numpy()).save(files[-1], quality=90)
    return files


class Photographs(Dataset[tuple[Tensor, int]]):
    """Decodes and transforms a file, as an ImageFolder would."""

    def __init__(self, files: list[Path], transform: Callable[[Any], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), int(path.name.split("_")[0])


class Data(L.LightningDataModule):
    """Training images with augmentation, and a quarter as many to validate."""

    def __init__(self, files: list[Path], case: Case, workers: int) -> None:
        super().__init__()
        end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
        crop = v2.RandomResizedCrop(case.pixels, antialias=True)
        whole = [v2.Resize(case.pixels, antialias=True), v2.CenterCrop(case.pixels)]
        augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment(), *end])
        part = max(case.batch, len(files) // 5)
        self.parts = (
            Photographs(files[part:], augment),
            Photographs(files[:part], v2.Compose([*whole, *end])),
        )
        self.how: dict[str, Any] = {"batch_size": case.batch, "num_workers": workers}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], shuffle=True, drop_last=True, **self.how)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], **self.how)

    def read(self) -> float:
        """Seconds that the loaders alone take, from the second training batch on."""
        start = 0.0
        for loader in (self.train_dataloader(), self.val_dataloader()):
            for _ in loader:
                start = start or time.perf_counter()
        return time.perf_counter() - start


class Classifier(L.LightningModule):
    """An ordinary classifier."""

    def __init__(self, name: str, lr: float = 1e-4) -> None:
        super().__init__()
        self.net, self.lr = timm.create_model(name, num_classes=CLASSES), lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


class Clock(L.Callback):
    """Times a run from its second training batch, when all is built and warm."""

    start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the time of the second batch."""
        if args[-1] == 1:
            self.start = now()

    def seconds(self) -> float:
        """Since then."""
        return now() - self.start


def now() -> float:
    """Seconds of a clock, when the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(methods: dict[str, Callable[[], float]], repeats: int) -> Timing:
    """As `interleave`, of methods that say themselves how long they took."""
    for method in methods.values():
        method()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(methods[name]())
        order.append(order.pop(0))
    return Timing(seconds)


def trainer(device: str, ranks: int = 1, callbacks: list[L.Callback] | None = None) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def compare(
    case: Case, files: list[Path], asked: Options, workers: int, ranks: int = 0, rank: int = 0
) -> list[Row]:
    """Rows of one case: base, sidekick and both in one run, and the data alone.

    With ``ranks`` this is one of several processes, and reads every ``ranks``-th file.
    """
    processes = max(1, ranks)

    def fit(name: str, sidekick: str | None = None) -> Callable[[], float]:
        def whole() -> float:
            torch.manual_seed(0)
            clock = Clock()
            added: list[L.Callback] = [clock]  # first, so that the duo's hooks are timed too
            if sidekick is not None:
                added.append(DuoCallback(sidekick, pretrained=False, probe=0, summary=False))
            data = Data(files, case, workers)
            trainer(asked.device, processes, added).fit(Classifier(name), data)
            return clock.seconds()

        return whole

    methods = {
        "base": fit(case.base),
        "sidekick": fit(case.sidekick),
        "callback": fit(case.base, case.sidekick),
        "data": Data(files[rank::processes], case, workers).read,
    }
    timing = in_turns(methods, repeats=max(3, asked.repeats // 3))
    turns = zip(*(timing.seconds[name] for name in ("base", "sidekick", "data")), strict=True)
    ideal = Spread.of([(b + s - d) / (b + s) for b, s, d in turns])
    rows = []
    for name, method in methods.items():
        alone = ("base", "sidekick") if name == "callback" else ("base",)
        peak = peak_memory(method, asked.device)
        part = "ranks" if ranks else "fit" if not workers else "fit, with workers"
        how = {"part": part, "workers": workers, "ranks": processes}
        row = {**how, **case._asdict(), **timing.row(name, *alone)}
        rows.append(row | {"peak_mb": None if peak is None else peak / 1e6})
    rows[2] |= {"ideal": ideal.median, "ideal_20": ideal.low, "ideal_80": ideal.high}
    return rows


class Nothing(nn.Module):
    """A sidekick that computes nothing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), -1)


class Timed(DuoCallback):
    """Seconds of each training step: in the hooks, in a plain loop, and from start to start."""

    def __init__(self) -> None:
        super().__init__(Nothing, summary=False)
        self.hooks: list[float] = []
        self.plain: list[float] = []
        self.starts: list[float] = []
        self.twin = Nothing(CLASSES)
        self.optimizer = torch.optim.AdamW(self.twin.parameters(), 1e-3)

    def on_train_batch_start(self, *args: Any) -> None:
        """Time the hook."""
        self.starts.append(time.perf_counter())
        super().on_train_batch_start(*args)
        self.hooks.append(time.perf_counter() - self.starts[-1])

    def on_train_batch_end(self, *args: Any) -> None:
        """Time the hook, and then what a plain loop takes to train such a sidekick."""
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        middle = time.perf_counter()
        inputs, targets = args[3]
        nn.functional.cross_entropy(self.twin(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hooks[-1] += middle - start
        self.plain.append(time.perf_counter() - middle)


def bookkeeping(batch: int, steps: int) -> Row:
    """What the callback itself takes of a step of ResNet-18 at 64 pixels, on the CPU."""
    torch.manual_seed(0)
    images = torch.randn(batch * steps, 3, 64, 64)
    data = torch.utils.data.TensorDataset(images, torch.randint(CLASSES, (batch * steps,)))
    timed = Timed()
    fitter = trainer("cpu", callbacks=[timed])
    fitter.limit_val_batches = 1
    fitter.fit(Classifier("resnet18"), DataLoader(data, batch), DataLoader(data, batch))
    seconds: dict[str, list[float]] = {"base's step": [], "bookkeeping": []}
    spans = zip(timed.starts, timed.starts[1:], timed.hooks, timed.plain, strict=False)
    for start, end, hooks, plain in list(spans)[5:]:  # the first build the sidekick and warm up
        seconds["base's step"].append(end - start - hooks - plain)
        seconds["bookkeeping"].append(hooks - plain)
    case = {"part": "bookkeeping", "base": "resnet18", "pixels": 64, "batch": batch}
    return case | Timing(seconds).row("bookkeeping", "base's step") | environment("cpu")


def measure(asked: Options, workers: int, ranks: Sequence[int]) -> Iterator[Row]:
    """Rows of all cases, then with a worker, several processes, and of the bookkeeping."""
    quiet()
    cases = (SMALL._replace(steps=8),) if asked.quick else CASES
    with tempfile.TemporaryDirectory() as folder:
        needed = max(case.batch * case.steps * 5 // 4 for case in cases) * max((2, *ranks))
        files = write_files(Path(folder), needed)
        for case in cases:
            count = case.batch * case.steps * 5 // 4
            yield from compare(case, files[:count], asked, workers)
        if not asked.quick and not workers:
            count = SMALL.batch * SMALL.steps * 5 // 4
            yield from compare(SMALL, files[:count], asked, workers=1)
        for number in ranks:
            yield from spawn(folder, number, asked, workers)
    for batch in (16,) if asked.quick else (8, 16, 32, 64):
        yield bookkeeping(batch, 25)


def spawn(folder: str, ranks: int, asked: Options, workers: int) -> list[Row]:
    """The small case in new processes of one thread each, by torchrun; rows of the first."""
    result = Path(folder) / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--standalone", __file__, "--inner", folder, "--workers", str(workers)]
    command += ["--device", asked.device, "--repeats", str(asked.repeats), "--threads", "1"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [{**row, "threads": 1} for row in json.loads(result.read_text())]


def inner(given: argparse.Namespace) -> None:
    """One of the processes that `spawn` starts."""
    quiet()
    ranks = int(os.environ["WORLD_SIZE"])
    asked = Options(False, given.device, given.repeats, 1)
    torch.set_num_threads(1)
    folder = Path(given.inner)
    files = sorted(folder.glob("*.jpg"))[: SMALL.batch * SMALL.steps * 5 // 4 * ranks]
    rows = compare(SMALL, files, asked, given.workers, ranks, int(os.environ["RANK"]))
    if os.environ["RANK"] == "0":
        (folder / "rows.json").write_text(json.dumps(rows))


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_duo").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--workers", type=int, default=0, help="processes that read data")
    made.add_argument(
        "--ranks", type=int, nargs="+", default=(), help="also measure with so many processes"
    )
    made.add_argument("--inner", help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.inner:
        inner(given)
    else:
        run("cofinetune", given, partial(measure, workers=given.workers, ranks=given.ranks), GROWTH)
