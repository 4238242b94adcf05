"""What a run tells its user: every remedy that a message names is tried."""

import lightning as L
import pytest
import torch
from helpers import NUM_CLASSES, TRAIN, VAL, Classifier, loader, small_net
from runs import INFO, fitted, make_duo
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_duo.cost import flops_balance


class Prepares(Classifier):
    """Calls its forward with what it makes of the batch, and a flag."""

    def forward(self, x: Tensor, scale: float, *, extra: Tensor | None = None) -> Tensor:
        return scale * self.net(x)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0] / 2, 3.0, extra=batch[0]), batch[1])

    validation_step = training_step


def test_arguments_are_named_by_where_they_come_from(caplog: pytest.LogCaptureFixture) -> None:
    def net(num_classes: int) -> nn.Module:
        class First(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_net(num_classes)

            def forward(self, x: Tensor, scale: float) -> Tensor:
                return self.net(x)

        return First()

    with caplog.at_level("INFO", INFO):
        fitted(make_duo(net), Prepares(), max_epochs=1)
    said = "base: self(a tensor that the step makes, 3.0, extra=batch[0]); targets: batch[1]"
    assert said in caplog.text


class Labelled(Classifier):
    """Several labels of an image, or one that holds or not."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    validation_step = training_step


@pytest.mark.parametrize(("count", "said"), [(1, "1 output,"), (5, "5 outputs,")])
def test_a_sidekick_has_as_many_outputs_as_the_base(
    count: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = VAL.tensors
    labels = (y[:, None] + torch.arange(count)).remainder(2).float()
    data = loader(TensorDataset(x, labels))
    with caplog.at_level("INFO", INFO):
        fitted(make_duo(), Labelled(count), train=data, val=data, max_epochs=1)
    assert f"sidekick 'small_net' is built for {said} as many as the base has" in caplog.text


def test_a_number_of_classes_that_is_not_the_bases_can_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"4 outputs .* with 7; leave num_classes out"):
        fitted(make_duo(num_classes=7), num_sanity_val_steps=0)
    duo, *_ = fitted(make_duo(), train=loader(TRAIN), max_epochs=1)
    assert duo.module(VAL.tensors[0][:2]).probs.shape == (2, NUM_CLASSES)


# ---- features of a frozen body, kept in the dataset ----


class Cached(L.LightningModule):
    """Trains a head on features that its frozen body gave before."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(512, NUM_CLASSES)

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.head(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def as_images(features: Tensor) -> Tensor:
    return features[:, :300].reshape(-1, 3, 10, 10)


@pytest.mark.parametrize(
    ("remedy", "options"),
    [
        (nn.Linear(512, NUM_CLASSES), {}),
        (lambda num_classes: nn.Linear(512, num_classes), {}),
        ("resnet10t", {"sidekick_transform": as_images, "pretrained": False}),
    ],
    ids=["module", "function", "transform"],
)
def test_features_are_no_images(remedy: object, options: dict) -> None:
    data = TensorDataset(torch.randn(32, 512), torch.arange(32) % NUM_CLASSES)
    given = {"train": loader(data), "val": loader(data), "max_epochs": 1}
    refused = (
        r"tensor \(16, 512\): .*takes images \(N, 3, H, W\).*a module, or a function.*"
        "sidekick_transform"
    )
    with pytest.raises(ValueError, match=refused):
        fitted(make_duo("resnet10t", pretrained=False), Cached(), **given)
    duo, *_ = fitted(make_duo(remedy, **options), Cached(), **given)
    assert duo.module(data.tensors[0][:3]).probs.shape == (3, NUM_CLASSES)


# ---- logits that only the step makes ----


class Links(L.LightningModule):
    """Scores pairs of nodes by products of what it encodes them to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 16)

    def encode(self, x: Tensor, edges: Tensor) -> Tensor:
        neighbours = torch.zeros(len(x), len(x)).index_put(tuple(edges), torch.ones(()))
        return neighbours @ self.net(x)

    def decode(self, z: Tensor, pairs: Tensor) -> Tensor:
        return (z[pairs[0]] * z[pairs[1]]).sum(-1)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        z = self.encode(batch["x"], batch["edges"])
        return binary_cross_entropy_with_logits(self.decode(z, batch["pairs"]), batch["holds"])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Pairs(nn.Module):
    """A sidekick that sees the nodes of a pair only."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Linear(16, num_classes)

    def forward(self, graph: dict) -> Tensor:
        return self.net(graph["x"][graph["pairs"]].movedim(0, 1).flatten(1)).flatten()


def graph(seed: int) -> dict:
    random = torch.Generator().manual_seed(seed)
    edges, pairs = (torch.randint(20, (2, n), generator=random) for n in (40, 30))
    holds = (torch.rand(30, generator=random) < 0.5).float()
    x = torch.randn(20, 8, generator=random)
    return {"x": x, "edges": edges, "pairs": pairs, "holds": holds}


def test_links_are_told() -> None:
    graphs = DataLoader([graph(i) for i in range(4)], batch_size=None)
    given = {"train": graphs, "val": graphs, "max_epochs": 1}
    with pytest.raises(ValueError, match=r"cannot run .* \(20, 8\): .*batch_fn=.*logits_fn="):
        fitted(make_duo(Pairs), Links(), **given)
    with pytest.raises(ValueError, match=r"logits \(20, 1\) but the base \(30,\).*logits_fn="):
        fitted(make_duo(lambda num_classes: nn.Linear(8, num_classes)), Links(), **given)

    def logits(module: Links, batch: dict) -> Tensor:
        return module.decode(module.encode(batch["x"], batch["edges"]), batch["pairs"])

    told = {"batch_fn": lambda batch: (batch, batch["holds"]), "logits_fn": logits}
    duo, module, _ = fitted(make_duo(Pairs, **told), Links(), **given)
    found = duo.module.base_logits(graph(1))
    torch.testing.assert_close(found, logits(module, graph(1)))
    assert len(duo.predictions["val"]["duo"].targets) == 4 * 30


def averaged(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of images, or the average of those of several crops of each."""
    return net(x) if x.ndim == 4 else net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


class Crops(Classifier):
    """Ten crops of each image in validation, and one in training."""

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(averaged(self.net, batch[0]), batch[1]))


class Averages(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = small_net(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return averaged(self.net, x)


@pytest.mark.parametrize("sanity", [0, 2])
def test_crops_in_validation_alone_are_told(sanity: int) -> None:
    x, y = VAL.tensors
    crops = x[:, None] + torch.randn(len(x), 10, 1, 1, 1)
    given = {"val": loader(TensorDataset(crops, y)), "num_sanity_val_steps": sanity}
    with pytest.raises(ValueError, match=r"logits_fn=lambda module, inputs"):
        fitted(make_duo(), Crops(), **given)
    told = {"logits_fn": lambda module, inputs: averaged(module.net, inputs)}
    with pytest.raises(ValueError, match=r"cannot run .* \(16, 10, 3, 8, 8\): .* a module, or"):
        fitted(make_duo(**told), Crops(), **given)
    duo, module, _ = fitted(make_duo(Averages, **told), Crops(), **given)
    module.eval()
    for inputs in (x[:5], crops[:5]):
        torch.testing.assert_close(duo.module.base_logits(inputs), averaged(module.net, inputs))


class Scaled(Classifier):
    """Makes its logits itself, and computes no loss in validation."""

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> dict | None:
        self.net(batch[0])

    def logits(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z[:, [1, 0, 3, 2]] + z.mean(1, keepdim=True)


class Returned(Scaled):
    def validation_step(self, batch: list, batch_idx: int) -> dict:
        return {"logits": self.logits(batch[0])}


def test_logits_that_the_step_makes_are_returned_where_it_computes_no_loss() -> None:
    given = {"num_sanity_val_steps": 0, "max_epochs": 1}
    with pytest.raises(ValueError, match=r'return \{"logits": \.\.\.\} from the validation step'):
        fitted(make_duo(), Scaled(), **given)
    duo, *_ = fitted(make_duo(), Returned(), **given)
    assert len(duo.predictions["val"]["base"].targets) == len(VAL)


# ---- what users return ----


def test_a_batch_fn_returns_two_values_of_which_one_is_a_tensor() -> None:
    for wrong, message in (
        (lambda batch: (*batch, None), r"got 3 values; return two .*lambda batch: \(batch\[0\], b"),
        (lambda batch: (batch[0], batch[1].tolist()), r"got list; make one .*torch\.tensor\("),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(make_duo(batch_fn=wrong))
    for right in (
        lambda batch: (batch[0], batch[1]),
        lambda batch: (batch[0], torch.tensor(batch[1].tolist())),
    ):
        duo, *_ = fitted(make_duo(batch_fn=right), max_epochs=1)
        assert duo.fit is not None


class Tuples(nn.Module):
    """Features and logits, not called so."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = small_net(num_classes)

    def forward(self, x: Tensor) -> tuple[str, Tensor]:
        return "logits", self.net(x)


class Alone(Tuples):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[1]


def test_a_sidekick_returns_its_logits_alone() -> None:
    with pytest.raises(ValueError, match="got tuple; pass a module whose forward returns its log"):
        fitted(make_duo(Tuples))
    duo, *_ = fitted(make_duo(Alone), max_epochs=1)
    assert duo.fit is not None


class Several(Classifier):
    """Cannot run a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (len(x) > 1 or None)


def test_the_cost_is_counted_with_another_input() -> None:
    with pytest.warns(UserWarning, match=r"cannot be counted.*cost\.flops_balance\(base, side"):
        duo, module, _ = fitted(make_duo(), Several(), max_epochs=1)
    assert duo.cost is duo.balance is None
    assert flops_balance(module, duo.sidekick, VAL.tensors[0][:2]) > 0
