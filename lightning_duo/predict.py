"""Predictions of a duo by `Trainer.predict`, with any of Lightning's devices and strategies."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_duo.base import Call
from lightning_duo.batch import read_inputs
from lightning_duo.files import whole
from lightning_duo.module import DuoModule, DuoOutput

Columns = dict[str, Any]  # name -> array whose first dimension is the sample


class DuoPredictor(LightningModule):
    """A duo as a LightningModule, for `Trainer.predict`.

    Args:
        duo: The duo, as from ``callback.module`` or `DuoModule.load`.
        inputs_fn: ``batch -> inputs``, for batches that are neither a tensor, a tuple that starts
            with the inputs, nor a mapping with usual keys. If the duo takes several arguments, it
            returns a call: ``lambda batch: Call((batch["ids"],), {"mask": batch["mask"]})`` for
            ``duo(ids, mask=mask)``; `Call` is in `lightning_duo.base`.

    Example:
        >>> import torch
        >>> duo = DuoModule(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), (1.0, 0.5))
        >>> DuoPredictor(duo).predict_step(torch.zeros(2, 4)).probs.shape
        torch.Size([2, 3])
    """

    def __init__(self, duo: DuoModule, *, inputs_fn: Callable[[Any], Any] = read_inputs) -> None:
        super().__init__()
        if not isinstance(duo, DuoModule):
            raise TypeError(
                f"DuoPredictor takes a DuoModule, such as callback.module; got {type(duo).__name__}"
            )
        self.duo, self.inputs_fn = duo, inputs_fn

    @override
    def forward(self, *args: Any, **kwargs: Any) -> DuoOutput:
        output: DuoOutput = self.duo(*args, **kwargs)
        return output

    @override
    def predict_step(self, batch: Any, *_: Any) -> DuoOutput:
        """Predict a batch.

        Raises:
            ValueError: If its inputs cannot be found.
        """
        output: DuoOutput = Call.with_input(self.inputs_fn(batch)).of(self.forward)
        return output


class PredictionWriter(BasePredictionWriter):
    """Writes what `Trainer.predict` gives for a `DuoPredictor` to one file, in the dataset's order.

    Columns are the sample's index in the dataset, the prediction, the confidence and whether it is
    accepted; with several dataloaders also which one. In ``*.npz`` each is an array, in the shape
    that `DuoOutput` has for a sample. In ``*.csv`` each is a column, or with several labels a
    column for each (``prediction_0``, ``prediction_1``, ...). Every process keeps its own samples
    (21 bytes for one decision, with probabilities 4 K more) and writes them to a part file in the
    same folder, which all must share; the first process puts them together at the end. The file
    appears whole or not at all. Samples of a dataset without indices (an iterable one, say) are
    numbered as they come, process by process; those of a batch that the collate function made
    smaller get -1.

    Args:
        path: The file, ``*.csv`` or ``*.npz``; the latter if a decision is made for each pixel or
            token of a sample.
        probs: Whether to write the probabilities of all classes too.

    Raises:
        ValueError: If the file has another ending. When predicting, if samples have several
            decisions that do not fit a csv file, or differ in size.

    Example:
        >>> writer = PredictionWriter("predictions.csv")
        >>> writer.path.name
        'predictions.csv'
    """

    def __init__(self, path: str | Path, *, probs: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.path, self.probs = Path(path), probs
        if self.path.suffix not in (".csv", ".npz"):
            raise ValueError(f"predictions are written to *.csv or *.npz, got {str(path)!r}")
        self._batches: list[Columns] = []

    @override
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).unlink(missing_ok=True)  # of a run that did not end

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not isinstance(prediction, DuoOutput):
            raise TypeError(
                "PredictionWriter writes the predictions of a DuoPredictor, got "
                f"{type(prediction).__name__} from {type(pl_module).__name__}; use "
                "trainer.predict(DuoPredictor(callback.module), ...)"
            )
        if self.path.suffix == ".csv" and prediction.probs.ndim > 2:
            raise ValueError(
                f"{self.path} has a line for each sample, but this duo makes a decision for each "
                f"of {tuple(prediction.prediction.shape[1:])} places of a sample; write to *.npz"
            )
        count = len(prediction.prediction)
        # For a loader without indices Lightning may pass on those of the loader before.
        loader = tree_leaves(trainer.predict_dataloaders)[dataloader_idx]
        tracked = hasattr(getattr(loader, "batch_sampler", None), "seen_batch_indices")
        known = tracked and batch_indices is not None and len(batch_indices) == count
        columns = {
            "loader": np.full(count, dataloader_idx, dtype=np.int32),
            "index": np.asarray(batch_indices if known else np.full(count, -1), dtype=np.int64),
            "prediction": prediction.prediction.cpu().numpy(),
            "confidence": prediction.confidence.float().cpu().numpy(),
            "accept": prediction.accept.cpu().numpy(),
        }
        if self.probs:
            columns["probs"] = prediction.probs.float().cpu().numpy()
        _check_sizes([*self._batches[:1], columns])
        self._batches.append(columns)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        columns = _joined(self._batches) if self._batches else {"index": np.zeros(0, dtype=int)}
        np.savez(self._part(trainer.global_rank), **columns)
        self._batches = []
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part(rank) for rank in range(trainer.world_size)]
            self._merge(parts, len(trainer.num_predict_batches))
        trainer.strategy.barrier()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}.npz")

    def _merge(self, parts: list[Path], loaders: int) -> None:
        if missing := [str(part) for part in parts if not part.exists()]:
            raise FileNotFoundError(
                f"other processes have written no predictions here ({', '.join(missing)} missing); "
                "write to a folder that all processes share"
            )
        found = [dict(np.load(part)) for part in parts]
        found = [columns for columns in found if len(columns["index"])]
        if not found:
            rank_zero_warn(f"there was nothing to predict, so {self.path} was not written")
            return
        _check_sizes(found)
        columns = _joined(found)
        _number(columns)
        unknown = columns["index"] < 0
        order = np.lexsort((columns["index"], unknown, columns["loader"]))
        columns = {name: values[order] for name, values in columns.items()}
        same = (np.diff(columns["index"]) == 0) & (np.diff(columns["loader"]) == 0)
        same &= columns["index"][1:] >= 0
        if same.any():
            rank_zero_warn(
                f"{int(same.sum())} samples were predicted more than once, because processes read "
                "the same data if use_distributed_sampler=False; the file holds every prediction"
            )
        if loaders == 1:
            del columns["loader"]
        with whole(self.path) as file:
            (_write_csv if self.path.suffix == ".csv" else _write_npz)(file, columns)
        for part in parts:
            part.unlink()


def _number(columns: Columns) -> None:
    """Number the samples of loaders that give no indices, and say so."""
    for loader in np.unique(columns["loader"]):
        rows = np.flatnonzero(columns["loader"] == loader)
        unknown = rows[columns["index"][rows] < 0]
        if len(unknown) == len(rows):
            columns["index"][rows] = np.arange(len(rows))
            rank_zero_warn(
                f"dataloader {loader} gives no indices of its samples; their predictions are "
                "numbered as they came"
            )
        elif len(unknown):
            rank_zero_warn(
                f"{len(unknown)} samples of dataloader {loader} came in batches of another size "
                "than its sampler chose, so their indices are unknown; the file says -1"
            )


def _check_sizes(parts: list[Columns]) -> None:
    """Refuse samples of several sizes, which no array holds."""
    sizes = sorted({part["prediction"].shape[1:] for part in parts})
    if len(sizes) > 1:
        raise ValueError(
            f"samples have predictions of several shapes, {' and '.join(map(str, sizes))}, and the "
            "arrays of one file must have one; bring all inputs to one size (pad or crop them in "
            "the collate function), or keep what trainer.predict returns"
        )


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write_npz(path: Path, columns: Columns) -> None:
    np.savez(path, **columns)


def _write_csv(path: Path, columns: Columns) -> None:
    if "probs" in columns:
        columns["prob"] = columns.pop("probs")
    columns["accept"] = columns["accept"].astype(int)
    tables = {name: values.reshape(len(values), -1) for name, values in columns.items()}
    names = [
        name if table.shape[1] == 1 else f"{name}_{k}"
        for name, table in tables.items()
        for k in range(table.shape[1])
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for parts in zip(*tables.values(), strict=True):
            cells = [x for part in parts for x in part.tolist()]
            writer.writerow([f"{x:.9g}" if isinstance(x, float) else x for x in cells])
