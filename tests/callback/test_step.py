"""Which logits of a step are the base's, and what is said where there are none."""

import copy
import warnings
from collections.abc import Callable

import lightning as L
import pytest
import torch
from helpers import TEST, TRAIN, VAL, Classifier, as_mapping, loader, make_trainer, small_net
from runs import INFO, check_duo, compare, fitted, logits_of, make_duo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_duo import DuoCallback
from lightning_duo.tasks import Labels


def validated(module: L.LightningModule, *beside: L.Callback, **options: object) -> DuoCallback:
    """Two models of which only the temperatures are fitted."""
    duo = make_duo(small_net(), **options)
    make_trainer(*beside, duo).validate(module, loader(VAL), verbose=False)
    return duo


def check_base(duo: DuoCallback, logits: Tensor, stage: str = "val") -> None:
    """These are the logits that counted as the base's, sample by sample."""
    found = duo.predictions[stage]["base"]
    each = cross_entropy(logits.double(), found.targets.long(), reduction="none")
    torch.testing.assert_close(found.nll.double(), each, rtol=1e-5, atol=1e-6)


class Counted(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Named(Counted):
    def validation_step(self, batch: list, batch_idx: int) -> dict:
        return {"logits": -self.net(batch[0])}


def test_logits_of_a_step_need_no_second_forward() -> None:
    for module, calls, sign in ((Counted(), 5, 1), (Named(), 0, -1)):
        duo = validated(module)
        assert module.calls == calls
        check_base(duo, sign * logits_of(module.net))


class NeverForward(Counted):
    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


def test_a_step_without_forward_costs_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", INFO):
        duo, module, _ = compare(NeverForward, num_sanity_val_steps=0)
    assert module.calls == 0
    assert caplog.text.count("base: self.net(batch[0]); targets: batch[1]") == 1
    check_duo(duo, module)


def test_of_several_forwards_the_one_on_the_batch_counts() -> None:
    class Looks(Classifier):
        def validation_step(self, batch: list, batch_idx: int) -> None:
            self(batch[0]), self(batch[0].flip(-1))

    module = Looks()
    with pytest.warns(UserWarning, match=r"forward 2 times.*logits_fn"):
        check_base(validated(module), logits_of(module))

    class Changes(Classifier):
        def validation_step(self, batch: list, batch_idx: int) -> None:
            self(batch[0] + 0), self(batch[0] + 1)

    with pytest.raises(ValueError, match=r'forward 2 times.*return {"logits": .*logits_fn'):
        validated(Changes())


def test_steps_that_change_the_inputs_are_said() -> None:
    class Scales(Classifier):
        def validation_step(self, batch: list, batch_idx: int) -> None:
            self(batch[0] / 3)

    with pytest.warns(UserWarning, match=r"forward with something else.*logits_fn"):
        validated(Scales())


class CallsTwice(Classifier):
    """For the loss and for the accuracy."""

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))
        self.log("val_accuracy", (self(x=batch[0]).argmax(1) == batch[1]).float().mean())


def test_equal_logits_of_two_calls_are_one_answer() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DuoCallback")
        check_duo(*fitted(module=CallsTwice())[:2])


class Peeks(L.Callback):
    """Calls the module before the duo has its turn."""

    def on_validation_batch_end(self, trainer: object, module: Classifier, *args: list) -> None:
        module(args[1][0] + 1)


def test_calls_of_other_callbacks_are_not_the_steps() -> None:
    module = Classifier()
    check_base(validated(module, Peeks()), logits_of(module))


@pytest.mark.parametrize("sanity", [0, 2])
def test_dict_batches_and_returned_logits(sanity: int) -> None:
    class Step(Classifier):
        """Never calls forward; its test step gives nothing, which takes one more forward."""

        def training_step(self, batch: dict, batch_idx: int) -> dict:
            logits = self.net(batch["pixel_values"])
            return {"loss": cross_entropy(logits, batch["labels"]), "logits": logits}

        validation_step = training_step

        def test_step(self, batch: dict, batch_idx: int) -> None:
            return None

    train, val, test = (DataLoader(d, 16, collate_fn=as_mapping) for d in (TRAIN, VAL, TEST))
    duo, module, trainer = fitted(None, Step(), train=train, val=val, num_sanity_val_steps=sanity)
    check_duo(duo, module)
    trainer.test(module, test, verbose=False)
    check_base(duo, logits_of(module, TEST), "test")


class NoForward(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0][1]), batch[0][0])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_adapters_for_batches_and_logits() -> None:
    def collate(samples: list) -> list:
        batch = as_mapping(samples)
        return [(batch["labels"], batch["pixel_values"])]

    modes = set()

    def logits_fn(module: NoForward, x: Tensor) -> Tensor:
        modes.add(module.training)
        return module.net(x)

    train, val = (DataLoader(d, 16, collate_fn=collate) for d in (TRAIN, VAL))
    adapted = {"batch_fn": lambda b: (b[0][1], b[0][0])}
    data = {"train": train, "val": val, "num_sanity_val_steps": 0}
    duo, module, _ = fitted(make_duo(**adapted, logits_fn=logits_fn), NoForward(), **data)
    assert modes == {False}  # eval mode, also where the step trains
    check_duo(duo, module, module.net)
    with pytest.raises(ValueError, match=r"NoForward has no forward.*logits_fn"):
        fitted(make_duo(**adapted), module, **data)


def test_probabilities_are_doubted_once() -> None:
    class Softmax(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    with pytest.warns(UserWarning, match="DuoCallback") as said:
        validated(Softmax())
    assert sum("probabilities" in str(w.message) for w in said) == 1


class Counts(Classifier):
    """Buffers that every forward changes, and something that it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        logits = self.net(x)
        if self._trainer is not None:
            self.log("norm", logits.norm())
        return logits


class CountsElsewhere(Counts):
    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


@pytest.mark.parametrize("make", [Counts, CountsElsewhere])
def test_forwards_of_the_callbacks_own_leave_buffers_and_logs_alone(make: type) -> None:
    compare(make)


class ReturnsFeatures(Classifier):
    def validation_step(self, batch: list, batch_idx: int) -> Tensor:
        super().validation_step(batch, batch_idx)
        return self.net[:2](batch[0])  # for a plot of embeddings


class ForwardGivesFeatures(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[:2](x)

    def logits(self, x: Tensor) -> Tensor:
        return self.net[2:](self(x))

    def training_step(self, batch: list, batch_idx: int) -> dict:
        logits = self.logits(batch[0])
        return {"loss": cross_entropy(logits, batch[1]), "logits": logits}

    def validation_step(self, batch: list, batch_idx: int) -> Tensor:
        return self.logits(batch[0])


class NarrowFeatures(Classifier):
    """Three features, of which the step makes logits, as it says by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = small_net(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)

    def training_step(self, batch: list, batch_idx: int) -> dict:
        logits = self.head(self(batch[0]))
        return {"loss": cross_entropy(logits, batch[1]), "logits": logits}

    validation_step = training_step


class Averages(Classifier):
    def validation_step(self, batch: list, batch_idx: int) -> dict:
        return {"logits": (self(batch[0]) + 3 * self(batch[0].flip(-1))) / 4}


def test_logits_that_a_step_returns_by_name_count_where_it_has_no_loss() -> None:
    with pytest.warns(UserWarning, match="returns other logits .*logits_fn") as warned:
        duo, base, _ = fitted(None, Averages())
    assert sum("other logits" in str(w.message) for w in warned) == 1
    base.eval()
    check_base(duo, logits_of(lambda x: (base(x) + 3 * base(x.flip(-1))) / 4))


@pytest.mark.parametrize(
    ("module", "logits"),
    [
        (ReturnsFeatures, lambda module, x: module(x)),
        (ForwardGivesFeatures, lambda module, x: module.logits(x)),
        (NarrowFeatures, lambda module, x: module.head(module(x))),
    ],
)
def test_features_are_not_taken_for_logits(module: type, logits: Callable) -> None:
    """Whichever of the two the step returns, or its forward gives."""
    duo, base, _ = fitted(None, module())
    base.eval()
    check_base(duo, logits_of(lambda x: logits(base, x)))
    with torch.no_grad():
        x, y = VAL.tensors[0][:16], VAL.tensors[1][:16]
        z = [logits(base, x), duo.sidekick.eval()(x)]
        want = sum(t * z for t, z in zip(duo.fit.temperatures, z, strict=True)).softmax(1)
        found = duo.module(x) if module is ReturnsFeatures else duo.module([x, y])
    torch.testing.assert_close(found.probs, want, atol=1e-5, rtol=1e-4)


# ---- models that cannot be ----


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda z: z[:, 0], r"logits \(16,\).*task=lightning_duo\.tasks\.Labels\(\)"),
        (lambda z: z[:, :1], r"logits \(16, 1\).*task=lightning_duo\.tasks\.Labels\(\)"),
        (lambda z: z[:, :, None, None].expand(-1, -1, 2, 2), r"\(16, 4, 2, 2\).*pixel"),
        (lambda z: z[:8], r"\(8, 4\).*\(16,\)"),
        (lambda z: z.argmax(1), "floating-point .*int64"),
        (lambda z: {"scores": z}, r"dict; pass DuoCallback\(.*logits_fn"),
        (lambda z: (z, 0), r"tuple; pass DuoCallback\(.*logits_fn"),
    ],
)
def test_logits_that_cannot_be_say_what_to_do(shape: Callable, message: str) -> None:
    """Where no loss tells: two trained models, and a step that only calls its forward."""

    class Shaped(Classifier):
        def forward(self, x: torch.Tensor) -> object:
            return shape(self.net(x))

        def validation_step(self, batch: list, batch_idx: int) -> None:
            self(batch[0])

    with pytest.raises(ValueError, match=message):
        validated(Shaped())
    if "Labels" in message:  # the way out that it names
        told = {"batch_fn": lambda b: (b[0], b[1] % 2), "task": Labels()}
        duo = make_duo(small_net(1), **told)
        make_trainer(duo).validate(Shaped(), loader(VAL), verbose=False)
        assert duo.module(VAL.tensors[0]).probs.numel() == 80


class OneOutput(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        return self(batch[0]).mean()

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self(batch[0])


class Crops(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(96, 4))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        halves = batch[0].unflatten(2, (2, 4)).unbind(2)
        return cross_entropy(sum(map(self.net, halves)), batch[1])

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("module", "sidekick", "message"),
    [
        (OneOutput, small_net, r"no loss of a classification.*DuoCallback\(.*logits_fn"),
        (Crops, small_net, r"logits \(16, 4\).*no output of a module.*DuoCallback\(.*logits_fn"),
        (
            Classifier,
            nn.Sequential(nn.Conv2d(5, 4, 8), nn.Flatten()),
            r"sidekick .*torch.float32 tensor \(16, 3, 8, 8\).*RuntimeError: .*5 channels"
            ".*sidekick_transform",
        ),
    ],
)
def test_what_a_model_cannot_run_is_named(
    module: type, sidekick: object, message: str, sanity: int
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(make_duo(copy.deepcopy(sidekick)), module(), num_sanity_val_steps=sanity)
