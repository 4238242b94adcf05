"""Which kinds of batch are read without a training step to tell, and what is said of others."""

import inspect
import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.logits import CollectedLogits, collect_logits
from lightning_duo.tasks import Classes, Labels

GENERATOR = torch.Generator().manual_seed(0)
X, EXTRA = torch.randn(2, 40, 6, generator=GENERATOR)
Y = torch.randint(3, (40,), generator=GENERATOR)
NUMBERS = torch.arange(40)


class One(nn.Module):
    """Takes one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Two(One):
    """Takes two, and may do with one."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.net(x if extra is None else x - 2 * extra)


class Both(One):
    """Takes two."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.net(first - 2 * second)


class ByName(One):
    """Takes whatever has a name, as wrappers of Hugging Face's models do."""

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(inputs["input_ids"] - 2 * inputs["attention_mask"])


class Module(L.LightningModule):
    """A LightningModule around a model, that logs and takes a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        self.log("calls", 1.0)
        assert "label" not in batch
        return {"logits": self.net(batch["image"])}


class OfGraph(One):
    """Takes an object, as models of PyTorch Geometric do."""

    def forward(self, data: Any) -> Tensor:
        assert not hasattr(data, "y")
        return self.net(data.x - 2 * data.pos)


class Graph:
    """In the manner of PyTorch Geometric."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Graph":
        parts = {k: change(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Graph(**parts)

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __delitem__(self, name: str) -> None:
        delattr(self, name)


@dataclass
class Sample:
    image: Tensor
    target: Tensor


WITHOUT, WITH = X, X - 2 * EXTRA
NAMES = [f"{i}.png" for i in range(40)]
READ = {
    "pair": (One, (X, Y), WITHOUT),
    "list": (One, [X, Y], WITHOUT),
    "path behind": (One, (X, Y, NAMES), WITHOUT),
    "one of two": (Two, (X, Y), WITHOUT),
    "one of two, path behind": (Two, (X, Y, NAMES), WITHOUT),
    "two inputs": (Both, (X, EXTRA, Y), WITH),
    "two inputs, path behind": (Both, (X, EXTRA, Y, NAMES), WITH),
    "inputs in a tuple": (Both, ((X, EXTRA), Y), WITH),
    "inputs in a mapping": (Both, ({"second": EXTRA, "first": X}, Y), WITH),
    "usual keys": (One, {"pixel_values": X, "labels": Y}, WITHOUT),
    "its own name": (One, {"x": X, "y": Y, "name": NAMES}, WITHOUT),
    "names": (Both, {"label": Y, "second": EXTRA, "first": X, "name": NAMES}, WITH),
    "usual key and a name": (Two, {"image": X, "extra": EXTRA, "label": Y}, WITH),
    "target among the arguments": (
        type("Pair", (Both,), {"forward": lambda self, x, y: Both.forward(self, x, y)}),
        {"x": X, "y": EXTRA, "label": Y},
        WITH,
    ),
    "any name": (
        ByName,
        UserDict(input_ids=X, attention_mask=EXTRA, labels=Y, text=NAMES),
        WITH,
    ),
    "whole mapping": (Module, {"image": X, "label": Y}, WITHOUT),
    "whole graph": (OfGraph, Graph(x=X, pos=EXTRA, y=Y), WITH),
    "parts of a graph": (
        type("Parts", (Both,), {"forward": lambda self, x, pos: Both.forward(self, x, pos)}),
        Graph(x=X, pos=EXTRA, y=Y, num_graphs=4),
        WITH,
    ),
    "dataclass": (One, Sample(X, Y), WITHOUT),
    "object": (
        type("Parts", (Both,), {"forward": lambda self, a, b: Both.forward(self, a, b)}),
        SimpleNamespace(a=X, b=EXTRA, label=Y),
        WITH,
    ),
}


def collected(base: nn.Module, batch: Any, **options: Any) -> CollectedLogits:
    torch.manual_seed(1)
    return collect_logits(base, type(base)(), [batch], **options)


@pytest.mark.parametrize("name", READ)
def test_a_batch_is_read_as_by_hand(name: str) -> None:
    kind, batch, inputs = READ[name]
    base = kind()
    found = collected(base, batch)
    torch.testing.assert_close(found.base, base.net(inputs).detach())
    torch.manual_seed(1)
    torch.testing.assert_close(found.sidekick, kind().net(inputs).detach())
    assert torch.equal(found.targets, Y)
    assert found.task == Classes()


def test_a_compiled_base_is_called_as_it_was_before() -> None:
    base = Both()
    compiled = torch.compile(base, backend="eager")
    found = collect_logits(compiled, Both(), [{"first": X, "second": EXTRA, "y": Y}])
    torch.testing.assert_close(found.base, base.net(WITH).detach())
    one = One()
    found = collect_logits(torch.compile(one, backend="eager"), One(), [{"image": X, "y": Y}])
    torch.testing.assert_close(found.base, one.net(X).detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_models_that_do_not_tell_their_arguments() -> None:
    models = [torch.jit.trace(nn.Linear(6, 3), X) for _ in range(2)]
    found = collect_logits(*models, [(X, Y)])
    torch.testing.assert_close(found.base, models[0](X).detach())


def test_arguments_that_the_sidekick_does_not_take_are_left_out() -> None:
    base, sidekick = Two(), One()
    found = collect_logits(base, sidekick, [{"x": X, "extra": EXTRA, "y": Y}])
    torch.testing.assert_close(found.base, base.net(WITH).detach())
    torch.testing.assert_close(found.sidekick, sidekick.net(X).detach())
    # As the duo will call it.
    torch.testing.assert_close(found.fitted_sidekick(x=X, extra=EXTRA), sidekick.net(X))


REFUSED: dict[str, tuple[type[nn.Module], Any, str, Callable[[Any], Any] | None]] = {
    "a tensor": (One, X, r"inputs and targets.*\(40, 6\).*batch_fn=", lambda b: (b, Y)),
    "no targets": (
        One,
        {"image": X},
        r"inputs and targets.*\['image'\]",
        lambda b: (b["image"], Y),
    ),
    "no tensor": (One, {"x": X, "y": [0, 1]}, r"'y' .*got list.*batch_fn=", lambda b: (X, Y)),
    "two targets": (
        One,
        {"x": X, "y": Y, "label": Y},
        "'label' and 'y' may both.*batch_fn=",
        lambda b: (b["x"], b["y"]),
    ),
    "no input": (
        Both,
        {"first": X, "y": Y},
        r"not clear which of \['first'\].*\['first', 'second'\].*batch_fn=.*Call",
        lambda b: (Call((b["first"],), {"second": EXTRA}), b["y"]),
    ),
    "optional second": (
        Two,
        (X, EXTRA, Y),
        r"3 parts.*\['x', 'extra'\].*not clear which part.*batch_fn=.*Call",
        lambda b: (Call((b[0], b[1]), {}), b[2]),
    ),
    "a list of targets": (
        Both,
        (X, EXTRA, Y.tolist()),
        r"3 parts.*which part is the tensor of targets.*batch_fn=",
        lambda b: (Call((b[0], b[1]), {}), torch.tensor(b[2])),
    ),
    "one input too few": (
        Both,
        (X, Y),
        r"the base cannot run .*\(40, 6\).*missing 1 required.*batch_fn=.*Call",
        lambda b: (Call((b[0], EXTRA), {}), b[1]),
    ),
    "another key": (
        One,
        {"picture": X, "label": Y},
        "the base cannot run .*TypeError.*batch_fn=",
        lambda b: (b["picture"], b["label"]),
    ),
    "masks": (
        OfGraph,
        Graph(x=X, pos=EXTRA, y=Y, val_mask=NUMBERS > 9),
        r"masks .*\(val_mask\).*batch_fn=.*torch.where\(batch.val_mask, batch.y, -100\)",
        lambda b: (Graph(x=X, pos=EXTRA), torch.where(b.val_mask, b.y, -100)),
    ),
    "neighbours": (
        OfGraph,
        Graph(x=X, pos=EXTRA, y=Y, batch_size=10, input_id=NUMBERS[:10]),
        r"first 10 of 40 nodes.*batch_fn=.*-100",
        lambda b: (Graph(x=X, pos=EXTRA), torch.where(NUMBERS < b.batch_size, b.y, -100)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_and_the_remedy_helps(name: str) -> None:
    kind, batch, message, remedy = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        collected(kind(), batch)
    base = kind()
    found = collected(base, batch, batch_fn=remedy)
    count = {"masks": slice(10, None), "neighbours": slice(10)}.get(name, slice(None))
    several = len(inspect.signature(base.forward).parameters) > 1 or kind is OfGraph
    torch.testing.assert_close(found.base, base.net(WITH if several else X).detach()[count])
    assert torch.equal(found.targets, Y[count])


@pytest.mark.parametrize(
    ("given", "message"), [((X, Y, X), "got 3 values"), ((X, [0, 1]), "got list"), (X, "got torch")]
)
def test_a_batch_fn_that_gives_something_else(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"batch_fn must return .*{message}"):
        collected(One(), (X, Y), batch_fn=lambda batch: given)


class InPlace(One):
    """Begins with an operation in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(2))


def test_the_data_stay_as_they_are() -> None:
    x = X.clone()
    found = collected(InPlace(), (x, Y))
    assert torch.equal(x, X)
    torch.manual_seed(1)
    torch.testing.assert_close(found.sidekick, InPlace().net(2 * X).detach())


def test_a_second_part_that_is_a_guess_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"part 1 .*batch_fn="):
        found = collected(One(), (X, Y, NUMBERS))
    assert torch.equal(found.targets, Y)
    again = collected(One(), (X, NUMBERS, Y), batch_fn=lambda batch: (batch[0], batch[2]))
    assert torch.equal(again.targets, Y)


def test_models_that_cannot_be_called() -> None:
    class NoForward(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

    base, sidekick = NoForward(), nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"no forward; pass the part.*LogitsOf\(lambda module"):
        collect_logits(base, sidekick, [(X, Y)])
    from lightning_duo import LogitsOf

    for remedy in (base.net, LogitsOf(lambda module, inputs: module.net(inputs), base)):
        assert torch.equal(collect_logits(remedy, sidekick, [(X, Y)]).base, base.net(X).detach())
    with pytest.raises(ValueError, match=r"the sidekick is on the meta device.*on the CPU"):
        collect_logits(base.net, nn.Linear(6, 3, device="meta"), [(X, Y)])
    small = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"the sidekick cannot run .*\(40, 6\).*nn.Sequential\("):
        collect_logits(base.net, small, [(X, Y)])
    found = collect_logits(base.net, nn.Sequential(nn.AdaptiveAvgPool1d(4), small), [(X, Y)])
    assert found.sidekick.shape == (40, 3)


class First(One):
    """Gives its logits first of two, a tensor of features behind."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x


def test_logits_within_a_tuple() -> None:
    for models, name in (((First(), One()), "base"), ((One(), First()), "sidekick")):
        with pytest.raises(ValueError, match=rf"the {name} must return.*tuple.*logits_at="):
            collect_logits(*models, [(X, Y)])
        found = collect_logits(*models, [(X, Y)], logits_at=(0,))
        torch.testing.assert_close(found.base, models[0].net(X).detach())
        torch.testing.assert_close(found.sidekick, models[1].net(X).detach())


def test_probabilities_in_place_of_logits() -> None:
    from lightning_duo import LogitsOf

    plain, soft = One(), nn.Sequential(One(), nn.Softmax(1))
    for models, name in (((soft, plain), "base"), ((plain, soft), "sidekick")):
        with pytest.raises(ValueError, match=rf"the {name} gives probabilities.*softmax.*LogitsOf"):
            collect_logits(*models, [(X, Y)])
    with pytest.raises(ValueError, match="the base gives probabilities"):  # at the end, of few
        collect_logits(soft, plain, [(X[:3], Y[:3])])
    mended = LogitsOf(lambda model, x: model(x).log(), soft)
    for found in (
        collect_logits(mended, plain, [(X, Y)]).base,
        collect_logits(plain, mended, [(X, Y)]).sidekick,
    ):
        torch.testing.assert_close(found, soft[0](X).log_softmax(1).detach())


def test_probabilities_of_labels() -> None:
    labels, plain = (EXTRA[:, :3] > 0).float(), One()
    soft = nn.Sequential(One(), nn.Sigmoid())
    z = soft[0](X).detach()
    with pytest.warns(UserWarning, match=r"outputs of the base .*probabilities=\('base',\)"):
        collect_logits(soft, plain, [(X, labels)], task=Labels())
    found = collect_logits(soft, plain, [(X, labels)], task=Labels(("base",)))
    torch.testing.assert_close(found.base[:, 1], z.flatten(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"the sidekick gives probabilities, .*leave 'sidekick'"):
        collect_logits(soft, plain, [(X, labels)], task=Labels(("base", "sidekick")))


def test_targets_that_are_no_classes() -> None:
    for bad in (255, 3, -1, -100):
        y = Y.where(NUMBERS != 5, bad)
        if bad != -100:  # which losses of PyTorch leave out
            message = rf"targets must be in 0\.\.2.*{bad}.*task=Classes\(ignore_index=\.\.\.\)"
            with pytest.raises(ValueError, match=message):
                collected(One(), (X, y))
        base = One()
        task = None if bad == -100 else Classes(ignore_index=bad)
        found = collected(base, (X, y), task=task)
        torch.testing.assert_close(found.base, base.net(X).detach()[NUMBERS != 5])
        assert torch.equal(found.targets, Y[NUMBERS != 5])
    void = Y.byte().where(NUMBERS != 5, 255)  # -100 would be 156 in this type
    found = collected(One(), (X, void), task=Classes(ignore_index=255))
    assert found.targets.dtype == torch.int64
    with pytest.raises(ValueError, match=r"nothing to fit.*no target counts"):
        collected(One(), (X, torch.full_like(Y, -100)))


def test_squares_may_be_pixels_or_tokens() -> None:
    logits = torch.randn(5, 3, 3, generator=GENERATOR)
    y = torch.randint(3, (5, 3), generator=GENERATOR)
    with pytest.raises(ValueError, match=re.escape("task=Classes(dim=...)")):
        collect_logits(nn.Identity(), nn.Identity(), [(logits, y)])
    for dim in (1, -1):
        found = collect_logits(nn.Identity(), nn.Identity(), [(logits, y)], task=Classes(dim=dim))
        assert torch.equal(found.base, logits.movedim(dim, -1).reshape(-1, 3))
