"""Any run, any head, with the one line alone."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import lightning as L
import pytest
import torch
from strangers.judge import Stranger, alone, fault_of_refusal, faults

from lightning_duo import DuoCallback

THEMES = (
    "images",
    "losses",
    "binary",
    "heads",
    "text",
    "hugging_face",
    "dense",
    "tables",
    "graphs",
    "running",
    "libraries",
    "earth",
    "chemistry",
    "medicine",
    "auto",
    "refused",
    "criteria",
    "batches",
    "sets",
    "steps",
    "disguised",
    "traps",
    "masks",
    "odd_losses",
    "same_tensor",
)
for name in THEMES:
    import_module(f"strangers.{name}")


def all_of(kind: type[Stranger]) -> Iterator[type[Stranger]]:
    for sub in kind.__subclasses__():
        yield from all_of(sub)
        if "module" in vars(sub):
            yield sub


STRANGERS = list(all_of(Stranger))
WORKING = [case for case in STRANGERS if not case.refused]
REFUSED = [case for case in STRANGERS if case.refused]


def named(case: type[Stranger]) -> str:
    return case.__name__


def installed(case: type[Stranger]) -> Stranger:
    for package in case.needs:
        pytest.importorskip(package)
    return case()


def make_callback(**arguments: Any) -> DuoCallback:
    """A sidekick that starts from nothing and learns something in two epochs."""
    recipe = {
        "probe": 0,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, 1e-2),
        "lr_scheduler": lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, 1.0),
        "summary": False,
    }
    return DuoCallback(**{**recipe, **arguments})


def mean_value(case: Stranger, module: L.LightningModule, val: Any) -> float:
    with torch.no_grad(), case.around():
        values = [float(case.value(module, batch)) for batch in case.batches(val)]
    return sum(values) / len(values)


@pytest.mark.parametrize("case", WORKING, ids=named)
def test_the_truth_is_what_the_module_logs(case: type[Stranger]) -> None:
    stranger = installed(case)
    done = alone(case)
    logged = float(done.trainer.callback_metrics[stranger.logged])
    assert logged == pytest.approx(mean_value(stranger, done.module, done.val), rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("case", WORKING, ids=named)
def test_the_module_learns_without_a_duo(case: type[Stranger]) -> None:
    stranger = installed(case)
    done = alone(case)
    untrained = stranger.module()
    untrained.load_state_dict(done.start)
    before, after = (
        mean_value(stranger, module, done.val) for module in (untrained.eval(), done.module)
    )
    assert after > before if stranger.higher_is_better else after < before


@pytest.mark.parametrize("case", WORKING, ids=named)
def test_a_duo_beside_it_is_as_by_hand(case: type[Stranger]) -> None:
    assert faults(installed(case), make_callback) == []


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_what_is_refused_runs_without_a_duo(case: type[Stranger]) -> None:
    installed(case)
    done = alone(case)
    moved = [not torch.equal(x, done.start[name]) for name, x in done.module.state_dict().items()]
    assert any(moved)


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_what_is_no_classification_is_refused(case: type[Stranger]) -> None:
    assert fault_of_refusal(installed(case), make_callback) is None
