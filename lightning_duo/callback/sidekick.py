"""The sidekick of a run: its model, what it sees, and what keeps a model from being one."""

import copy
from types import MethodType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_duo.base import Call
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.outputs import check_no_probabilities, run_sidekick
from lightning_duo.inputs import Calling
from lightning_duo.isolation import evaluating, own_stream
from lightning_duo.nested import mapped
from lightning_duo.tasks import Labels, Task
from lightning_duo.text import check_tokens
from lightning_duo.zoo import build_sidekick


def copies(*models: nn.Module) -> tuple[nn.Module, ...]:
    """Deep copies made in one go, so that none refers to an original.

    Raises:
        MisconfigurationException: If a model cannot be copied.
    """
    # Losses and outputs that the user's steps have kept on the module are no leaves of autograd,
    # which refuse to be copied.
    parts = [part for model in models for part in model.modules()]
    kept = [leaf for part in parts for leaf in tree_leaves(list(vars(part).values()))]
    memo = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    try:
        copied = copy.deepcopy(models, memo)
    except Exception as error:
        names = " or ".join(type(model).__name__ for model in models)
        raise MisconfigurationException(
            f"{names} cannot be copied ({type(error).__name__}: {error}); give it a __deepcopy__ "
            "or take away the attribute that cannot be copied"
        ) from error
    for part, twin in zip(
        parts, (part for model in copied for part in model.modules()), strict=True
    ):
        for name, function in list(vars(twin).items()):
            compiled = getattr(function, "_torchdynamo_orig_callable", None)
            if (
                isinstance(compiled, MethodType) and compiled.__self__ is part
            ):  # it runs the original's weights
                del vars(twin)[name]
                if not hasattr(twin, name):
                    vars(twin)[name] = MethodType(compiled.__func__, twin)
    return copied


def _own_copy(model: nn.Module, base: nn.Module, *, given: bool) -> nn.Module:
    """A copy to train; or the model itself, if a function made it and no copy of it would do.

    Raises:
        MisconfigurationException: If there is no copy of a model that may belong to others.
    """
    problem = None
    try:
        (copied,) = copies(model)
        problem = _tie(model, copied)
    except MisconfigurationException as error:
        problem = str(error)
    if problem is None:
        return copied
    theirs = {p.data_ptr() for p in base.parameters() if not is_lazy(p)} - {0}
    shared = any(p.data_ptr() in theirs for p in model.parameters() if not is_lazy(p))
    if given or shared:
        raise MisconfigurationException(
            f"the sidekick is trained as a copy of what you gave, and {problem}; pass a function "
            "num_classes -> nn.Module that makes a new one"
        )
    return model


def _tie(model: nn.Module, copied: nn.Module) -> str | None:
    """What still ties a copy to its original: functions, which copies share."""
    for part, other in zip(model.modules(), copied.modules(), strict=True):
        name = type(part).__name__
        own = vars(part).get("forward")
        if own is not None and own is vars(other).get("forward"):
            return f"the forward of its {name} was replaced by a function, which a copy shares"
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if any(getattr(hook, "__closure__", None) for hook in hooks):
            return f"its {name} has a hook that refers to other objects, which a copy shares"
    if any(p._backward_hooks for p in model.parameters()):
        return "its parameters have hooks, which a copy does not have"
    return None


def check_model(model: nn.Module, *, trained: bool) -> None:
    """Find what keeps a model from being a sidekick.

    Args:
        model: The model, before or after it was built.
        trained: Whether it is about to be trained.

    Raises:
        MisconfigurationException: If its parameters have no values, are on several devices, or
            none of them can be trained though they should be.
    """
    devices = sorted({str(p.device) for p in model.parameters()})
    if devices == ["meta"]:
        raise MisconfigurationException(
            "the sidekick is on the meta device, so its weights have no values; build it on the "
            "CPU, the callback moves it to the base's device"
        )
    if len(devices) > 1:
        raise MisconfigurationException(
            f"the sidekick is spread over several devices, {' and '.join(devices)}; put it on one "
            "(sidekick.cpu()), the callback moves it to the base's device"
        )
    if trained and not any(p.requires_grad for p in model.parameters()):
        raise MisconfigurationException(
            "the sidekick has no trainable parameters; call requires_grad_(True) on it, or fit "
            "only the temperatures with trainer.validate"
        )


class Sidekick:
    """The sidekick of a run: a model for K classes, and what it sees of the base's inputs.

    Args:
        model: The model, this run's alone.
        num_classes: K.
        base: The base.
        options: The user's.
        messages: Where to say what its inputs go through.
        in_chans: Channels of the images that a named model was made for.
        per_token: Whether a named model was made to classify every token.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        base: nn.Module,
        options: Options,
        messages: Messages,
        *,
        in_chans: int = 3,
        per_token: bool = False,
    ) -> None:
        self.model, self.num_classes = model, num_classes
        self.in_chans, self.per_token = in_chans, per_token
        self.gives_probabilities = False
        """Of labels, where the base does too; known from the first outputs."""
        self._looked = False
        given = options.sidekick_transform
        if isinstance(given, nn.Module):
            (given,) = copies(given)  # it may keep statistics, which are this run's
        self.calling = Calling(model, base, given, messages.info)

    @classmethod
    def build(
        cls,
        options: Options,
        num_classes: int,
        base: nn.Module,
        messages: Messages,
        *,
        in_chans: int = 3,
        per_token: bool = False,
        restored: bool = False,
    ) -> "Sidekick":
        """Make the model; the global random streams do not notice.

        A model that was given, or that a function returns, is copied: it may belong to others.

        Args:
            options: The user's.
            num_classes: K.
            base: The base, whose device it goes to.
            messages: Where to say what was built.
            in_chans: Channels of the images that a named model is to take.
            per_token: Whether a named text model is to classify every token.
            restored: Whether weights of a checkpoint follow, so that none are fetched.

        Raises:
            MisconfigurationException: If it cannot be a sidekick, or be copied.
            ValueError: If it cannot read the base's tokens.
        """
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        with own_stream(device), torch.inference_mode(False), torch.enable_grad():
            model = build_sidekick(
                options.sidekick,
                num_classes,
                pretrained=options.pretrained and not restored,
                weights=None if restored else options.weights,
                in_chans=in_chans,
                per_token=per_token,
            )
            if not isinstance(options.sidekick, str):
                model = _own_copy(model, base, given=model is options.sidekick)
        check_model(model, trained=False)
        if options.num_classes is None and not isinstance(options.sidekick, nn.Module):
            messages.info(
                f"sidekick {options.sidekick_name!r} is built for {num_classes} "
                f"output{'s'[: num_classes != 1]}, as many as the base has"
            )
        for problem in check_tokens(base, model):
            messages.warn(problem)
        return cls(
            model,
            num_classes,
            base,
            options,
            messages,
            in_chans=in_chans,
            per_token=per_token,
        )

    def call(self, call: Call, part: nn.Module | None = None) -> Call:
        """What the sidekick is called with; no gradient flows back into it.

        The transform is given the first argument; others are passed on as they are. Arguments that
        the base can do without and the sidekick's forward does not take are left out.

        Args:
            call: The base's.
            part: What of the base was called so; by default all of it.
        """
        detached: Call = mapped(call, Tensor.detach)
        return self.calling.of(detached, part)

    def look(self, logits: Tensor, task: Task) -> None:
        """Look at the first outputs: are they logits?

        Raises:
            ValueError: If they are probabilities where the base gives logits.
        """
        if self._looked or not logits.numel():
            return
        self._looked = True
        check_no_probabilities(logits, task)
        if isinstance(task, Labels) and "base" in task.probabilities:
            with torch.no_grad():
                self.gives_probabilities = bool(((logits >= 0) & (logits <= 1)).all())

    def initialize(self, device: torch.device, call: Call) -> None:
        """Let layers that take their shapes from the first batch have them."""
        if any(is_lazy(parameter) for parameter in self.model.parameters()):
            with own_stream(device), evaluating(self.model):
                run_sidekick(self.model, self.call(call))

    def deployable(self) -> nn.Module:
        """The model, behind what makes the base's call its own."""
        return self.calling.deployable()

    def state(self) -> dict[str, Any]:
        """How it is called and what it gives, in plain types; its weights are not part of it."""
        return {**self.calling.state(), "gives_probabilities": self.gives_probabilities}

    def restore(self, state: dict[str, Any]) -> None:
        """Be called as when the state was taken."""
        self.calling.restore(state)
        self.gives_probabilities = state["gives_probabilities"]
