"""The two models of a duo: what they may be, and where."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_duo import DuoModule
from lightning_duo.export import export_duo

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = (1.5, 0.7)


def pair() -> tuple[nn.Linear, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3), nn.Linear(4, 3)


class Client:
    """Asks a model that is not in this process, say."""

    def __init__(self, model: nn.Module, answer: Any) -> None:
        self.model, self.answer = model, answer

    def __call__(self, x: Tensor, *, scale: float = 1.0) -> Any:
        return self.answer(scale * self.model(x).detach())


ANSWERS = {
    "tensor": lambda logits: logits,
    "array": lambda logits: logits.numpy(),
    "double": lambda logits: logits.double().numpy(),
    "lists": lambda logits: logits.tolist(),
    "mapping": lambda logits: {"logits": logits},
    "json": lambda logits: {"logits": logits.tolist()},
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_base_may_be_any_callable(answer: str) -> None:
    base, sidekick = pair()
    duo = DuoModule(Client(base, ANSWERS[answer]), sidekick, WEIGHTS)
    logits = (WEIGHTS[0] * base(X) + WEIGHTS[1] * sidekick(X)).double()
    torch.testing.assert_close(duo(X).probs.double(), logits.softmax(1), rtol=1e-5, atol=1e-6)
    assert "base=Client, sidekick=Linear" in repr(duo)


def test_a_callable_gets_the_arguments_of_the_call() -> None:
    base, _ = pair()
    client = Client(base, ANSWERS["tensor"])
    duo = DuoModule(client, client, WEIGHTS)
    torch.testing.assert_close(duo.base_logits(X, scale=3.0), 3 * base(X))


def test_a_duo_with_a_callable_is_saved_but_not_exported(tmp_path: Path) -> None:
    base, sidekick = pair()
    client = Client(base, ANSWERS["lists"])
    duo = DuoModule(client, sidekick, WEIGHTS, threshold=0.4)
    with pytest.raises(ValueError, match=r"base of this duo is a plain callable.*make a torch\.nn"):
        export_duo(duo, tmp_path / "duo.pt2", X)
    duo.save(tmp_path / "duo.safetensors")
    again = DuoModule.load(tmp_path / "duo.safetensors", client, nn.Linear(4, 3))
    assert torch.equal(again(X).probs, duo(X).probs)
    assert torch.equal(again.threshold, duo.threshold)


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear, np.zeros(3), "resnet34"])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="the base must be a model, or another callable"):
        DuoModule(wrong, nn.Linear(4, 3), WEIGHTS)
    with pytest.raises(TypeError, match="the sidekick must be a model, or another callable"):
        DuoModule(nn.Linear(4, 3), wrong, WEIGHTS)


def test_a_callable_that_gives_no_logits_is_refused() -> None:
    duo = DuoModule(lambda x: ["a", "b"], nn.Linear(4, 3), WEIGHTS)
    with pytest.raises(ValueError, match=r"must return floating-point logits.*got list"):
        duo(X)


def test_an_outer_list_is_no_sample() -> None:
    base, sidekick = pair()
    duo = DuoModule(Client(base, lambda logits: [logits.tolist()]), sidekick, WEIGHTS)
    with pytest.raises(ValueError, match=r"take the outer list of the base's answer away"):
        duo(X)


class Offloaded(nn.Module):
    """Its weights are on the meta device, and come to where they are needed in a call."""

    def __init__(self, model: nn.Linear) -> None:
        super().__init__()
        self.kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.model = nn.Linear(4, 3, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.kept, (x,))


@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_come_when_they_are_needed(which: int) -> None:
    models: list[nn.Module] = list(pair())
    want = DuoModule(*models, WEIGHTS)(X)
    models[which] = Offloaded(models[which])
    duo = DuoModule(*models, WEIGHTS)
    assert duo.temperatures.device.type == "cpu"
    torch.testing.assert_close(duo(X).probs, want.probs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cuda", ["base", "sidekick"])
def test_two_devices(cuda: str) -> None:
    base, sidekick = pair()
    want = DuoModule(base, sidekick, WEIGHTS)(X)
    duo = DuoModule(base, sidekick, WEIGHTS)
    getattr(duo, cuda).to("cuda")
    found = duo(X.to("cuda") if cuda == "base" else X)
    assert found.probs.device.type == ("cuda" if cuda == "base" else "cpu")
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-5)
