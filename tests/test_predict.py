"""Trainer.predict with a duo, and the file of its predictions."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Classifier, loader, make_trainer, small_images, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_duo import DuoCallback, DuoModule, DuoPredictor, PredictionWriter
from lightning_duo.base import Call
from lightning_duo.tasks import Classes, Labels, Task

DATA = small_images(50, 4)


def make_duo() -> DuoModule:
    torch.manual_seed(1)
    return DuoModule(small_net(), small_net(), (1.3, 0.7), threshold=0.4).eval()


def read_csv(path: Path) -> dict[str, np.ndarray]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("ending", ["csv", "npz"])
@pytest.mark.parametrize("probs", [False, True])
def test_predictions_are_written_in_the_datasets_order(
    ending: str, probs: bool, tmp_path: Path
) -> None:
    duo, path = make_duo(), tmp_path / "new" / f"out.{ending}"
    writer = PredictionWriter(path, probs=probs)
    shuffled = loader(DATA, shuffle=True)
    outputs = make_trainer(writer).predict(DuoPredictor(duo), shuffled)
    assert [len(output.prediction) for output in outputs] == [16, 16, 16, 2]
    with torch.no_grad():
        expected = duo(DATA.tensors[0])
    found = dict(np.load(path)) if ending == "npz" else read_csv(path)
    assert list(path.parent.iterdir()) == [path]
    assert found["index"].tolist() == list(range(50))
    assert found["prediction"].tolist() == expected.prediction.tolist()
    assert found["accept"].astype(bool).tolist() == expected.accept.tolist()
    # Other batches: other rounding.
    np.testing.assert_allclose(found["confidence"], expected.confidence, rtol=1e-5)
    if not probs:
        assert set(found) == {"index", "prediction", "confidence", "accept"}
    elif ending == "npz":
        np.testing.assert_allclose(found["probs"], expected.probs, rtol=1e-5)
    else:
        np.testing.assert_allclose(found["prob_3"], expected.probs[:, 3], rtol=1e-5)


def test_several_loaders_and_datasets_without_indices(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> object:
            return iter(DATA.tensors[0][:10])

    path = tmp_path / "out.npz"
    make_trainer(PredictionWriter(path)).predict(
        DuoPredictor(make_duo()), [loader(DATA), loader(DATA)], return_predictions=False
    )
    assert np.load(path)["loader"].tolist() == [0] * 50 + [1] * 50
    trainer = make_trainer(PredictionWriter(path))
    trainer.predict(DuoPredictor(make_duo()), DataLoader(Stream(), 4))
    assert np.load(path)["index"].tolist() == list(range(10))


def test_inputs_of_other_batches(tmp_path: Path) -> None:
    images = DATA.tensors[0][:8]

    def named(samples: list) -> dict:
        return {"picture": torch.stack([x for (x,) in samples])}

    data = DataLoader(TensorDataset(images), 4, collate_fn=named)
    own = DuoPredictor(make_duo(), inputs_fn=lambda batch: batch["picture"])
    assert len(make_trainer().predict(own, data)) == 2
    with pytest.raises(ValueError, match=r"\['picture'\].*inputs_fn="):
        make_trainer().predict(DuoPredictor(make_duo()), data)


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\*\.csv or \*\.npz.*'out\.parquet'"):
        PredictionWriter("out.parquet")
    with pytest.raises(TypeError, match=r"DuoModule.*Linear"):
        DuoPredictor(nn.Linear(2, 2))

    class Plain(Classifier):
        def predict_step(self, batch: list, batch_idx: int) -> Tensor:
            return self(batch[0])

    with pytest.raises(TypeError, match=r"Tensor from Plain.*trainer\.predict\(DuoPredictor"):
        make_trainer(PredictionWriter(tmp_path / "out.csv")).predict(Plain(), loader(DATA))


def test_the_callback_has_no_part_in_predict(tmp_path: Path) -> None:
    """It may stay in the Trainer, whatever is predicted and from whichever checkpoint."""
    callback, module = DuoCallback(small_net, summary=False), Classifier()
    trainer = make_trainer(callback, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(module, loader(DATA), loader(DATA))
    best = trainer.checkpoint_callback.best_model_path
    before, expected = callback.fit, callback.module(DATA.tensors[0])
    outputs = trainer.predict(DuoPredictor(callback.module), loader(DATA))
    torch.testing.assert_close(torch.cat([o.probs for o in outputs]), expected.probs)
    other = DuoCallback(small_net, summary=False)
    images = DataLoader(DATA.tensors[0], 16)
    make_trainer(other).predict(module, images, ckpt_path=best)
    assert other.fit is None
    assert callback.fit is before
    assert torch.equal(callback.module(DATA.tensors[0]).probs, expected.probs)


def indices(path: Path) -> list[int]:
    return np.load(path)["index"].tolist()


def test_indices_are_those_of_the_dataset_or_none(tmp_path: Path) -> None:
    """Whatever another loader, or the collate function, makes of its own."""

    class Stream(IterableDataset):
        def __iter__(self) -> object:
            return iter(DATA.tensors[0][:10])

    duo, path = make_duo(), tmp_path / "out.npz"
    both = [loader(DATA, shuffle=True), DataLoader(Stream(), 4)]
    with pytest.warns(UserWarning, match="dataloader 1 .*indices.*numbered"):
        make_trainer(PredictionWriter(path)).predict(DuoPredictor(duo), both)
    assert indices(path) == [*range(50), *range(10)]
    with torch.no_grad():
        expected = duo(DATA.tensors[0]).confidence
    np.testing.assert_allclose(np.load(path)["confidence"][:50], expected, rtol=1e-5)

    def without_the_first(samples: list) -> list:
        return [torch.stack(part) for part in zip(*samples[len(samples) == 2 :], strict=True)]

    smaller = DataLoader(DATA, 16, collate_fn=without_the_first)  # the last batch has 2 samples
    with pytest.warns(UserWarning, match="1 samples of dataloader 0 .*-1"):
        make_trainer(PredictionWriter(path)).predict(DuoPredictor(duo), smaller)
    assert indices(path) == [*range(48), -1]


def test_parts_of_a_run_that_did_not_end_are_not_taken(tmp_path: Path) -> None:
    class Nothing(IterableDataset):
        def __iter__(self) -> object:
            return iter(())

    path = tmp_path / "out.npz"
    np.savez(tmp_path / "out.npz.part0.npz", index=np.arange(3))
    with pytest.warns(UserWarning, match=r"nothing to predict.*out\.npz"):
        make_trainer(PredictionWriter(path)).predict(
            DuoPredictor(make_duo()), DataLoader(Nothing(), 4)
        )
    assert not path.exists()


def duo_of(task: Task, *shape: int) -> DuoModule:
    """Two linear models whose outputs have a shape for each sample."""
    torch.manual_seed(2)
    size = int(np.prod(shape))
    models = [
        nn.Sequential(nn.Flatten(), nn.Linear(192, size), nn.Unflatten(1, shape or (1,)))
        for _ in range(2)
    ]
    if not shape:
        models = [nn.Sequential(model, nn.Flatten(0)) for model in models]
    return DuoModule(*models, (1.3, 0.7), threshold=0.6, task=task).eval()


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (Labels(), ()),
        (Labels(), (3,)),
        (Labels(), (2, 3)),
        (Classes(), (4, 3, 2)),
        (Classes(dim=-1), (5, 3)),
    ],
)
def test_arrays_have_the_shape_of_the_output(task: Task, shape: tuple, tmp_path: Path) -> None:
    duo, path = duo_of(task, *shape), tmp_path / "out.npz"
    writer = PredictionWriter(path, probs=True)
    make_trainer(writer).predict(DuoPredictor(duo), loader(DATA, shuffle=True))
    with torch.no_grad():
        expected = duo(DATA.tensors[0])
    found = np.load(path)
    for name, values in expected._asdict().items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "ends"), [((), [""]), ((1,), [""]), ((2,), ["_0", "_1"])])
def test_labels_are_columns(shape: tuple, ends: list, tmp_path: Path) -> None:
    duo, path = duo_of(Labels(), *shape), tmp_path / "out.csv"
    writer = PredictionWriter(path, probs=True)
    make_trainer(writer).predict(DuoPredictor(duo), loader(DATA, shuffle=True))
    found = read_csv(path)
    names = ("prediction", "confidence", "accept", "prob")
    assert list(found) == ["index", *(name + end for name in names for end in ends)]
    with torch.no_grad():
        expected = duo(DATA.tensors[0])
    for name, values in zip(names, (*expected[1:], expected[0]), strict=True):
        columns = np.stack([found[name + end] for end in ends], 1)
        np.testing.assert_allclose(columns, values.reshape(50, -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "shape", "places"),
    [
        (Classes(), (4, 3, 2), r"\(3, 2\)"),
        (Classes(dim=-1), (5, 3), r"\(5,\)"),
        (Labels(), (2, 3), r"\(2, 3\)"),
    ],
)
def test_many_decisions_for_a_sample_do_not_fit_lines(
    task: Task, shape: tuple, places: str, tmp_path: Path
) -> None:
    writer = PredictionWriter(tmp_path / "out.csv")
    with pytest.raises(ValueError, match=rf"out\.csv .*{places} places.*\*\.npz"):
        make_trainer(writer).predict(DuoPredictor(duo_of(task, *shape)), loader(DATA))


def test_samples_of_several_sizes_do_not_fit_arrays(tmp_path: Path) -> None:
    convolutions = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    predictor = DuoPredictor(DuoModule(*convolutions, (1.0, 0.5)).eval())
    batches = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 6, 8)]
    with pytest.raises(ValueError, match=r"\(6, 8\) and \(8, 8\).*pad or crop"):
        make_trainer(PredictionWriter(tmp_path / "out.npz")).predict(
            predictor, DataLoader(batches, batch_size=None)
        )


def test_a_duo_of_several_arguments(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)

        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            return self.net(x * mask)

    duo, x, mask = DuoModule(Both(), Both(), (1.0, 0.5)).eval(), torch.randn(8, 5), torch.rand(8, 5)
    predictor = DuoPredictor(duo, inputs_fn=lambda batch: Call((batch[0],), {"mask": batch[1]}))
    outputs = make_trainer().predict(predictor, DataLoader(TensorDataset(x, mask), 4))
    probs = torch.cat([output.probs for output in outputs])
    torch.testing.assert_close(probs, duo(x, mask=mask).probs)
    assert torch.equal(predictor(x, mask=mask).probs, duo(x, mask=mask).probs)
