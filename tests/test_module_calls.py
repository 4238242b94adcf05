"""Duos called as their models are, whatever goes in and whatever comes out."""

import dataclasses
from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_duo import DuoModule, LogitsOf
from lightning_duo.base import Call, logits_in, logits_like
from lightning_duo.tasks import Classes, Labels


class Text(nn.Module):
    """Takes several arguments by name, and changes one of them in place."""

    def __init__(self, spoils: bool = False) -> None:
        super().__init__()
        self.net, self.spoils = nn.Linear(5, 3), spoils

    def forward(self, ids: Tensor, *, mask: Tensor) -> Tensor:
        out = self.net(ids * mask)
        if self.spoils:
            ids.zero_(), mask.zero_()
        return out


def test_several_arguments_reach_both_models_as_they_are() -> None:
    duo = DuoModule(Text(spoils=True), Text(), (1.5, 0.7)).eval()
    ids, mask = torch.randn(4, 5), torch.rand(4, 5)
    kept = ids.clone(), mask.clone()
    found = duo(ids, mask=mask)
    assert torch.equal(ids, kept[0])
    assert torch.equal(mask, kept[1])
    z = 1.5 * duo.base.net(ids * mask) + 0.7 * duo.sidekick.net(ids * mask)
    torch.testing.assert_close(found.probs, z.softmax(1))
    torch.testing.assert_close(duo.logits(ids=ids, mask=mask), z)
    first, second = duo.member_logits(ids, mask=mask)
    assert torch.equal(duo.sidekick_logits(ids, mask=mask), second)
    assert torch.equal(duo.base_logits(ids.clone(), mask=mask.clone()), first)


def test_the_models_themselves_return_what_they_return() -> None:
    duo = DuoModule(Returns(dict(out=1)), Returns("x"), (1.0, 1.0))
    assert (duo.base(None), duo.sidekick(None)) == ({"out": 1}, "x")


@dataclasses.dataclass
class Sentence:
    x: Tensor
    name: str = "a"


class Labelled(Tensor):
    """A subclass of the user's, such as an image with its colour space."""


Pair = namedtuple("Pair", "x y")


class Spoils(nn.Module):
    """Reads a tensor out of a structure and changes it there."""

    def __init__(self, key: Any, kind: type = Tensor) -> None:
        super().__init__()
        self.net, self.key, self.kind = nn.Linear(5, 3), key, kind

    def forward(self, value: Any) -> Tensor:
        named = isinstance(self.key, str) and hasattr(value, self.key)
        x = getattr(value, self.key) if named else value[self.key]
        assert type(x) is self.kind
        out = self.net(torch.Tensor(x))
        x.zero_()
        return out


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda x: {"x": x}, "x"),
        (lambda x: UserDict(x=x, name="a"), "x"),
        (lambda x: [x], 0),
        (lambda x: Pair(x, None), "x"),
        (Sentence, "x"),
        (lambda x: SimpleNamespace(x=x), "x"),
    ],
)
@pytest.mark.parametrize("kind", [Tensor, Labelled])
def test_the_base_gets_copies_whatever_holds_the_tensors(make: Any, key: Any, kind: type) -> None:
    x = torch.randn(4, 5)
    duo = DuoModule(Spoils(key, kind), Spoils(key, kind), (1.0, 1.0)).eval()
    given = make(x.clone().as_subclass(kind))
    first, second = duo.member_logits(given)
    torch.testing.assert_close(first, duo.base.net(x))
    torch.testing.assert_close(second, duo.sidekick.net(x))


def test_graphs() -> None:
    geometric = pytest.importorskip("torch_geometric")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = geometric.nn.GCNConv(5, 3)

        def forward(self, graph: Any) -> Tensor:
            out = geometric.nn.global_mean_pool(self.net(graph.x, graph.edge_index), graph.batch)
            graph.x.zero_()
            return out

    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [geometric.data.Data(x=torch.randn(3, 5), edge_index=edges) for _ in range(4)]
    batch = geometric.data.Batch.from_data_list(graphs)
    duo = DuoModule(Net(), Net(), (1.0, 0.5)).eval()
    expected = duo.base(batch.clone()) + 0.5 * duo.sidekick(batch.clone())
    torch.testing.assert_close(duo(batch).probs, expected.softmax(1))


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Any) -> Any:
        return self.output


STEPS = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
LAST, FIRST, OTHER = STEPS[:, -1], STEPS[:, 0], torch.randn(4, 3)


@pytest.mark.parametrize(
    ("output", "path", "logits"),
    [
        (LAST, (), LAST),
        ({"logits": LAST}, (), LAST),
        (Pair(LAST, None), ("x",), LAST),
        ((OTHER, {"out": LAST}), (1, "out"), LAST),
        (SimpleNamespace(heads=[OTHER, LAST]), ("heads", 1), LAST),
        ((STEPS, OTHER), (0, "[:, -1]"), LAST),
        ((STEPS, OTHER), (0, "[:, 0]"), FIRST),
        (STEPS, (0, "[:, -1]"), LAST),
        (STEPS, ("[:, 0]",), FIRST),
        (SimpleNamespace(logits=LAST), ("out",), LAST),  # another model than the path is of
        ((LAST.long(), SimpleNamespace(logits=LAST)), (0,), None),
        (None, (), None),
        (torch.tensor(1.0), (), None),
        ((LAST, OTHER), (), None),
    ],
)
def test_logits_are_where_the_path_leads_or_under_their_name(
    output: Any, path: tuple, logits: Tensor | None
) -> None:
    found = logits_in(output, path)
    assert found is None if logits is None else torch.equal(found, logits)


@pytest.mark.parametrize(
    ("base", "sidekick"),
    [
        ((STEPS, OTHER), STEPS),
        ((STEPS, OTHER), LAST),
        (STEPS, {"logits": LAST}),
        (STEPS, (LAST, None)),
        ((STEPS, OTHER), (STEPS, OTHER)),
    ],
)
def test_a_sidekick_may_lack_the_steps_of_the_base(base: Any, sidekick: Any) -> None:
    duo = DuoModule(Returns(base), Returns(sidekick), (1.0, 1.0), logits_at=(0, "[:, -1]"))
    first, second = duo.member_logits(STEPS)
    assert torch.equal(first, LAST)
    assert torch.equal(second, LAST)
    assert torch.equal(duo.sidekick_logits(STEPS), LAST)


@pytest.mark.parametrize(("one", "other"), [((4,), (4, 1)), ((4, 1), (4,)), ((1, 1), (1,))])
def test_a_dimension_of_one_makes_no_difference(one: tuple, other: tuple) -> None:
    base, sidekick = torch.randn(one), torch.randn(other)
    duo = DuoModule(Returns(base), Returns(sidekick), (1.0, 2.0), task=Labels())
    expected = torch.sigmoid(base + 2 * sidekick.view(one))
    torch.testing.assert_close(duo(None).probs, expected)


@pytest.mark.parametrize("other", [(4, 5), (4,), (3, 4), (4, 3, 2)])
def test_shapes_that_differ_are_named(other: tuple) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(4, 3\) and \(" + str(other[0])):
        logits_like(torch.zeros(4, 3), torch.zeros(other), ("[:, -1]",))


def test_what_holds_no_logits_is_named_with_the_remedy() -> None:
    base, sidekick = Returns((LAST, OTHER)), Returns(LAST)
    with pytest.raises(ValueError, match=r"base .*got tuple.*logits_at=.*\(0,\)"):
        DuoModule(base, sidekick, (1.0, 1.0))(None)
    DuoModule(base, sidekick, (1.0, 1.0), logits_at=(0,))(None)


def test_a_function_of_the_logits_takes_the_call() -> None:
    base = LogitsOf(lambda net, ids, mask: 2 * net(ids, mask=mask), Text())
    ids, mask = torch.randn(4, 5), torch.rand(4, 5)
    call = Call((ids,), {"mask": mask})
    assert torch.equal(call.of(base), 2 * call.of(base.module))
    duo = DuoModule(base, Text(), (1.0, 1.0), task=Classes())
    assert call.of(duo).probs.shape == (4, 3)
    assert Call.with_input(ids) == Call((ids,), {})
    assert Call.with_input(call) is call


def test_a_duo_of_several_inputs_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    duo = DuoModule(Text(), Text(), (1.0, 0.5), task=Labels()).eval()
    compiled = torch.compile(duo, fullgraph=True, dynamic=True)
    for count in (6, 4):
        ids, mask = torch.randn(count, 5), torch.rand(count, 5)
        torch.testing.assert_close(compiled(ids, mask=mask), duo(ids, mask=mask))
