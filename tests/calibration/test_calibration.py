"""A duo of two trained models without training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Classifier, loader, make_logits, make_trainer, small_images, small_net

from lightning_duo import DuoCallback, fit_temperatures, select_threshold
from lightning_duo.calibration import Calibration, calibrate
from lightning_duo.evaluation import evaluate
from lightning_duo.logits import collect_logits
from lightning_duo.tasks import Classes, Labels

BASE, SIDEKICK, TARGETS = make_logits(500, 5, seed=3)


def duo_probs(calibration: Calibration) -> torch.Tensor:
    t_base, t_sidekick = calibration.temperatures
    return (t_base * BASE.double() + t_sidekick * SIDEKICK.double()).softmax(1)


@pytest.mark.parametrize("delta", [None, 0.1])
def test_it_is_the_fit_and_a_threshold(delta: float | None) -> None:
    found = calibrate(BASE, SIDEKICK, TARGETS, target_accuracy=0.95, delta=delta)
    assert found.fit == fit_temperatures(BASE, SIDEKICK, TARGETS)
    confidence, prediction = duo_probs(found).max(1)
    expected = select_threshold(confidence, prediction == TARGETS, 0.95, delta=delta)
    assert 0 < expected.coverage < 1
    assert found.threshold == pytest.approx(expected, rel=1e-6)
    assert (found.samples, found.num_classes) == (500, 5)


@pytest.mark.parametrize(
    "options", [{}, {"target_accuracy": 0.9}, {"target_accuracy": 0.999, "delta": 1e-9}]
)
def test_the_file_holds_it_all(options: dict, tmp_path: Path) -> None:
    context = pytest.warns(UserWarning, match="nothing is accepted") if "delta" in options else None
    if context:
        with context:
            found = calibrate(BASE, SIDEKICK, TARGETS, **options)
        assert found.threshold.value == math.inf
    else:
        found = calibrate(BASE, SIDEKICK, TARGETS, **options)
    path = found.save(tmp_path / "new" / "temperatures.json")
    loaded = Calibration.load(path)
    assert loaded.state_dict() == found.state_dict()
    assert loaded.fit == found.fit
    # Any JSON reader can read it, also one that knows no Infinity and NaN.
    state = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert state["temperatures"] == found.temperatures._asdict()
    assert [path.name for path in path.parent.iterdir()] == ["temperatures.json"]


def test_the_duo_of_two_trained_models_and_a_loader_is_that_of_the_callback() -> None:
    base, sidekick = Classifier(), small_net()
    validation, test = small_images(128, 2), small_images(64, 3)
    with pytest.warns(UserWarning, match="better than chance"):  # the models are not trained
        found = calibrate(*collect_logits(base, sidekick, loader(validation)), target_accuracy=0.3)
    callback = DuoCallback(sidekick, summary=False, target_accuracy=0.3)
    make_trainer(callback).validate(base, loader(validation), verbose=False)
    assert found.temperatures == pytest.approx(callback.fit.temperatures, rel=1e-5)
    ours, theirs = found.module(base, sidekick), callback.module
    assert not ours.training
    for mine, other in zip(ours(test.tensors[0]), theirs(test.tensors[0]), strict=True):
        torch.testing.assert_close(mine, other)
    assert ours.threshold == pytest.approx(found.threshold.value)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"delta .*target_accuracy"):
        calibrate(BASE, SIDEKICK, TARGETS, delta=0.1)
    with pytest.raises(ValueError, match=r"accuracy .*\[0, 1\].*95.*0\.95"):
        calibrate(BASE, SIDEKICK, TARGETS, target_accuracy=95)
    with pytest.raises(ValueError, match=r"sidekick_logits .*NaN .*1 of 500 .*\[4\]"):
        calibrate(BASE, SIDEKICK.index_fill(0, torch.tensor(4), torch.nan), TARGETS)
    found = calibrate(BASE, SIDEKICK, TARGETS)
    with pytest.raises(ValueError, match=r"\*\.json.*temperatures\.yaml"):
        found.save(tmp_path / "temperatures.yaml")
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        Calibration.load(tmp_path / "none.json")
    for text in (
        "{",
        "[]",
        "{}",
        '{"format": "other"}',
        '{"format": "lightning_duo/calibration/1"}',
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json .*Calibration\.save"):
            Calibration.load(tmp_path / "other.json")


def test_what_cannot_work_well_is_warned_of() -> None:
    perfect = torch.eye(5)[TARGETS]
    with pytest.warns(UserWarning, match="without error.*more samples"):
        calibrate(perfect, perfect, TARGETS)
    with pytest.warns(UserWarning, match="50 samples .*several hundred"):
        calibrate(BASE[:50], SIDEKICK[:50], TARGETS[:50])
    with pytest.warns(UserWarning, match="neither model .*same order"):
        calibrate(-BASE, -SIDEKICK, TARGETS)
    with pytest.raises(ValueError, match=r"base_logits .*torch\.as_tensor.*ndarray"):
        calibrate(BASE.numpy(), SIDEKICK.numpy(), TARGETS.numpy())


@pytest.mark.parametrize(("count", "classes"), [(300, 4), (3000, 400)])  # in float64, in float32
def test_the_samples_that_fitted_are_recognised(count: int, classes: int, tmp_path: Path) -> None:
    base, sidekick, targets = make_logits(count, classes, seed=0)
    found = Calibration.load(calibrate(base, sidekick, targets).save(tmp_path / "found.json"))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = [x[order] for x in (base, sidekick, targets)]
    assert found.fitted_on(evaluate(*shuffled, found.fit))
    assert not found.fitted_on(evaluate(*make_logits(count, classes, seed=1), found.fit))
    assert not found.fitted_on(evaluate(*(x[:-1] for x in shuffled), found.fit))
    twice = [torch.cat([x, x]) for x in shuffled]
    assert not found.fitted_on(evaluate(*twice, found.fit))
    of_old = replace(found, unscaled=None)  # as in files that do not remember it
    assert of_old.fitted_on(evaluate(*shuffled, found.fit)) == (classes == 4)


def test_samples_of_a_duo_without_errors_or_without_use_are_told_apart() -> None:
    def useless(seed: int) -> tuple[torch.Tensor, ...]:
        base, sidekick, targets = make_logits(200, 4, seed, margin=3.0)
        return -base, -sidekick, targets

    sure = [make_logits(200, 4, seed, margin=30.0) for seed in (0, 1)]
    for (mine, other), said in ((sure, "without error"), ((useless(2), useless(3)), "are 0")):
        with pytest.warns(UserWarning, match=said):
            found = calibrate(*mine)
        assert found.fitted_on(evaluate(*mine, found.fit))
        assert not found.fitted_on(evaluate(*other, found.fit))


def test_a_file_that_was_edited_is_refused(tmp_path: Path) -> None:
    path = calibrate(*make_logits(300, 4, seed=0)).save(tmp_path / "found.json")
    state = json.loads(path.read_text())
    state["temperatures"]["base"] = 9
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"found\.json .*edited.*'base': 9.*DuoModule"):
        Calibration.load(path)


@pytest.mark.parametrize("task", [Classes(), Classes(dim=-1, ignore_index=-100), Labels(("base",))])
def test_the_task_is_kept(task: Classes | Labels, tmp_path: Path) -> None:
    found = calibrate(BASE, SIDEKICK, TARGETS, task=task)
    loaded = Calibration.load(found.save(tmp_path / "found.json"))
    assert found.task == loaded.task == task
    state = json.loads((tmp_path / "found.json").read_text())
    duo = loaded.module(torch.nn.Identity(), torch.nn.Linear(5, 5))
    assert duo.task == task  # without it the duo of several labels would be one of classes
    # Versions that know no tasks read format 1 alone.
    assert state["format"] == f"lightning_duo/calibration/{1 if task == Classes() else 2}"
    del state["task"]
    assert Calibration.from_state_dict(state).task == Classes()


def test_no_guarantee_of_rows_that_depend_on_each_other() -> None:
    pairs = torch.arange(500) // 2
    with pytest.raises(ValueError, match=r"independent decisions.*one row for each item.*delta"):
        calibrate(BASE, SIDEKICK, TARGETS, target_accuracy=0.9, delta=0.1, items=pairs)
    plain = calibrate(BASE, SIDEKICK, TARGETS, target_accuracy=0.9)
    assert calibrate(BASE, SIDEKICK, TARGETS, target_accuracy=0.9, items=pairs) == plain  # a remedy
    one_each = BASE[::2], SIDEKICK[::2], TARGETS[::2]  # the other
    sure = calibrate(*one_each, target_accuracy=0.9, delta=0.1, items=pairs[::2])
    assert sure == calibrate(*one_each, target_accuracy=0.9, delta=0.1)
    assert 0 < sure.threshold.coverage < 1
