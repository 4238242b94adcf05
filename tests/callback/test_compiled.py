"""What is compiled stays what it is: the same graphs, as often, and the same numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from helpers import VAL, Classifier
from runs import check_duo, compare
from torch import Tensor, nn

cross_entropy = nn.functional.cross_entropy


class Backend:
    """Compiles nothing, and keeps what it was given to compile."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        nodes = [node for node in graph.graph.nodes if node.op.startswith("call")]
        self.graphs.append(" ".join(str(node.target) for node in nodes))
        return graph.forward


class Growth(L.Callback):
    """How many graphs there were at the end of every epoch."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.counts: list[int] = []

    def on_train_epoch_end(self, *_: object) -> None:
        self.counts.append(len(self.backend.graphs))


class Quiet(Classifier):
    """Logs nothing, which would take long to compile."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def whole(backend: Backend) -> L.LightningModule:
    return torch.compile(Quiet(), backend=backend)


def itself(backend: Backend) -> L.LightningModule:
    module = Classifier()
    module.compile(backend=backend, fullgraph=True)
    return module


def part(backend: Backend) -> L.LightningModule:
    module = Classifier()
    module.net = torch.compile(module.net, backend=backend, fullgraph=True)
    return module


def part_in_place(backend: Backend) -> L.LightningModule:
    module = Classifier()
    module.net.compile(backend=backend, fullgraph=True)
    return module


class WithLoss(Classifier):
    """A loss that is a function on the module."""

    def __init__(self, loss: Callable) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))


def loss(backend: Backend) -> L.LightningModule:
    return WithLoss(torch.compile(cross_entropy, backend=backend, fullgraph=True))


def loss_module(backend: Backend) -> L.LightningModule:
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    criterion.compile(backend=backend, fullgraph=True)
    return WithLoss(criterion)


def features(backend: Backend) -> L.LightningModule:
    """A function that a step calls, with the module inside and the loss outside."""
    module = Classifier()
    compiled = torch.compile(lambda x: module.net(x), backend=backend, fullgraph=True)
    object.__setattr__(module, "forward", compiled)
    return module


class Shared(Classifier):
    """Both steps are one compiled function; the metric is counted before the loss."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.seen = 0
        self._shared = torch.compile(self._step, backend=backend, fullgraph=True)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.net(x), y)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        self.seen += 1
        return self._shared(*batch)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", self._shared(*batch))


class Normalizes(Classifier):
    """A compiled step that makes the inputs of its module itself."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0] * 0.5), batch[1])


def normalizes(backend: Backend) -> L.LightningModule:
    module = Normalizes()
    module.training_step = torch.compile(module.training_step, backend=backend, fullgraph=True)
    return module


class ByHand(Quiet):
    """Optimizes by itself; its step is compiled, but for what cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list, batch_idx: int) -> None:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: list, batch_idx: int) -> None:
        cross_entropy(self.net(batch[0]), batch[1])


def by_hand(backend: Backend) -> L.LightningModule:
    return torch.compile(ByHand(), backend=backend)


KINDS: dict[str, Callable[[Backend], L.LightningModule]] = {
    "whole": whole,
    "itself": itself,
    "part": part,
    "part in place": part_in_place,
    "loss": loss,
    "loss module": loss_module,
    "features": features,
    "shared": Shared,
    "normalizes": normalizes,
    "by hand": by_hand,
}


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_the_callback_leaves_what_is_compiled_as_it_is(kind: str) -> None:
    """The base is bit for bit what it is alone, of the same graphs, which are soon all there are.

    A step that is compiled as a whole shows no logits, so the base runs once more for them, which
    may have a graph of its own.
    """
    backends: list[Backend] = []
    growths: list[Growth] = []

    def make() -> Any:
        torch._dynamo.reset()
        backends.append(Backend())
        return KINDS[kind](backends[-1])

    def beside() -> list[L.Callback]:
        growths.append(Growth(backends[-1]))
        return [growths[-1]]

    duo, module, _ = compare(make, callbacks=beside, max_epochs=3)
    alone, together = (set(backend.graphs) for backend in backends)
    assert alone <= together
    assert len(together - alone) <= (kind in ("whole", "by hand"))
    assert growths[1].counts[1] == growths[1].counts[2]
    with torch.compiler.set_stance("force_eager"):
        check_duo(duo, module, module.net)
    assert duo.progress.updates == 21


@pytest.mark.parametrize("kind", ["whole", "itself"])
def test_the_duo_of_a_compiled_module_is_a_copy(kind: str) -> None:
    """Whatever becomes of the weights that were compiled."""
    duo, module, _ = compare(lambda: KINDS[kind](Backend()), max_epochs=2)
    x = VAL.tensors[0][:8]
    deployed = duo.module
    before = deployed(x).probs
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(deployed(x).probs, before, rtol=0, atol=0)
