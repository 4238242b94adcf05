"""The sidekick of a run: its model, what it sees, and what keeps a model from being one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_duo.base import Call, logits_in, logits_like
from lightning_duo.batch import describe
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.isolation import evaluating, own_stream
from lightning_duo.nested import Path, leaves, mapped
from lightning_duo.tasks import Classes, Labels, Task
from lightning_duo.zoo import build_sidekick, data_config


def input_transform(sidekick: nn.Module, base: nn.Module, inputs: Any) -> nn.Module | None:
    """What turns the base's inputs into the sidekick's, as far as their data configs tell.

    Resizes if the sidekick takes one size only; re-normalises if both models state a mean and
    standard deviation and these differ.

    Args:
        sidekick: The sidekick's model.
        base: The base; a timm model inside it states its data config.
        inputs: A batch of the base's inputs, (N, C, H, W) if they are images.

    Returns:
        A transform on the batch, or None if the sidekick can take it as it is.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return None
    from torchvision.transforms import v2

    steps: list[nn.Module] = []
    config, size = data_config(sidekick), _only_size(sidekick)
    if size is not None and size != list(inputs.shape[-2:]):
        steps.append(v2.Resize(size, antialias=True))
    stated = [found for part in base.modules() if (found := data_config(part))]
    channels = inputs.shape[1]
    means = [found.get("mean") or () for found in (*stated, config)]
    if len(stated) == 1 and all(len(mean) == channels for mean in means):
        mean_base, std_base = (torch.tensor(stated[0][key]) for key in ("mean", "std"))
        mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
        if not (torch.allclose(mean_base, mean) and torch.allclose(std_base, std)):
            # x * std_base + mean_base are the pixels the base's normalisation came from.
            steps.append(
                v2.Normalize(((mean - mean_base) / std_base).tolist(), (std / std_base).tolist())
            )
    if not steps:
        return None
    return nn.Sequential(*steps)


def _only_size(sidekick: nn.Module) -> list[int] | None:
    """Height and width of images, if the model takes no other, as vision transformers state."""
    config = data_config(sidekick)
    size = getattr(sidekick, "image_size", None)  # torchvision's
    if config.get("fixed_input_size"):
        size = config["input_size"][-2:]
    return None if size is None else [size, size] if isinstance(size, int) else list(size)


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
        return copy.deepcopy(models, memo)
    except Exception as error:
        names = " or ".join(type(model).__name__ for model in models)
        raise MisconfigurationException(
            f"{names} cannot be copied ({type(error).__name__}: {error}); give it a __deepcopy__ "
            "or take away the attribute that cannot be copied"
        ) from error


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
        options: The user's.
        messages: Where to say what its inputs go through.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, options: Options, messages: Messages
    ) -> None:
        self.model, self.num_classes, self.messages = model, num_classes, messages
        self.gives_probabilities = False
        """Of labels, where the base does too; known from the first outputs."""
        self._looked = False
        given = options.sidekick_transform
        if isinstance(given, nn.Module):
            (given,) = copies(given)  # it may keep statistics, which are this run's
        # Whether images are resized first -> what the inputs go through; known when first needed.
        self._transforms: dict[bool, Callable[[Any], Any] | None]
        self._transforms = {} if given is None else {False: given, True: given}

    @classmethod
    def build(
        cls,
        options: Options,
        num_classes: int,
        base: nn.Module,
        messages: Messages,
        *,
        restored: bool = False,
    ) -> "Sidekick":
        """Make the model; the global random streams do not notice.

        A model that was given, or that a function returns, is copied: it may belong to others.

        Args:
            options: The user's.
            num_classes: K.
            base: The base, whose device it goes to.
            messages: Where to say what was built.
            restored: Whether weights of a checkpoint follow, so that none are fetched.

        Raises:
            MisconfigurationException: If it cannot be a sidekick, or be copied.
        """
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        with own_stream(device), torch.inference_mode(False), torch.enable_grad():
            model = build_sidekick(
                options.sidekick,
                num_classes,
                pretrained=options.pretrained and not restored,
                weights=None if restored else options.weights,
            )
            if not isinstance(options.sidekick, str):
                model = _own_copy(model, base, given=model is options.sidekick)
        check_model(model, trained=False)
        if options.num_classes is None and not isinstance(options.sidekick, nn.Module):
            messages.info(
                f"sidekick {options.sidekick_name!r} has {num_classes} classes, as the base's "
                "logits do"
            )
        return cls(model, num_classes, options, messages)

    def call(self, base: nn.Module, call: Call) -> Call:
        """What the sidekick is called with; no gradient flows back into it.

        The transform is given the first argument; others are passed on as they are.
        """
        call = mapped(call, Tensor.detach)
        transform = self._transform_of(base, first_input(call))
        return call if transform is None else with_first(call, transform)

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

    def _transform_of(self, base: nn.Module, inputs: Any) -> Callable[[Any], Any] | None:
        resized = self._must_resize(inputs)
        if resized not in self._transforms:
            found = self._transforms[resized] = input_transform(self.model, base, inputs)
            if found is not None:
                self.messages.info(f"the sidekick sees the base's inputs through {found}")
        return self._transforms[resized]

    def _must_resize(self, inputs: Any) -> bool:
        """Whether these are images of another size than the only one that the model takes."""
        images = isinstance(inputs, Tensor) and inputs.ndim == 4
        size = _only_size(self.model) if images else None
        return size is not None and list(inputs.shape[-2:]) != size

    def initialize(self, base: nn.Module, call: Call) -> None:
        """Let layers that take their shapes from the first batch have them."""
        if any(is_lazy(parameter) for parameter in self.model.parameters()):
            device = next((p.device for p in base.parameters()), torch.device("cpu"))
            with own_stream(device), evaluating(self.model):
                run_sidekick(self.model, self.call(base, call))

    def deployable(self) -> nn.Module:
        """The model, behind its transform if it has one."""
        # One that resizes does for images of both kinds.
        transform = self._transforms.get(True, self._transforms.get(False))
        if transform is None:
            return self.model
        first = transform if isinstance(transform, nn.Module) else _Callable(transform)
        return Transformed(first, self.model)


class Transformed(nn.Sequential):
    """A transform of the first argument of a call, and the model that is called with the result."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        transform, model = self
        return with_first(Call(args, kwargs), transform).of(model)


class _Callable(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    @override
    def forward(self, x: Any) -> Any:
        return self.function(x)


def first_input(call: Call) -> Any:
    """The first argument of a call; None if it has none."""
    return next(iter((*call.args, *call.kwargs.values())), None)


def with_first(call: Call, change: Callable[[Any], Any]) -> Call:
    """A call with another first argument."""
    if call.args:
        return Call((change(call.args[0]), *call.args[1:]), call.kwargs)
    changed = {name: change(value) for name, value in list(call.kwargs.items())[:1]}
    return Call((), {**call.kwargs, **changed})


def run_sidekick(model: nn.Module, call: Call) -> Any:
    """What the sidekick returns.

    Raises:
        ValueError: If it cannot run these inputs.
    """
    try:
        return call.of(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model may raise
        seen = [describe(leaf) for _, leaf in leaves(call)][:3]
        raise ValueError(
            f"the sidekick cannot run the base's inputs ({', '.join(seen)}): "
            f"{type(error).__name__}: {error}; pass DuoCallback(..., sidekick_transform=...) that "
            "makes of them what it takes, such as lambda x: x.expand(-1, 3, -1, -1) for gray "
            "images, or another sidekick"
        ) from error


def sidekick_logits(output: Any, base: Tensor | None, logits_at: Path, task: Task) -> Tensor:
    """The logits in what the sidekick returned, in the shape of the base's if they are given.

    Raises:
        ValueError: If there are none, of another shape, or probabilities of classes.
    """
    if base is None:
        logits = logits_in(output, logits_at, fewest=3)
    else:
        try:
            logits = logits_like(base, output, logits_at)
        except ValueError as error:
            raise ValueError(
                f"{error}: give the sidekick a head with {task.outputs(base)} outputs, or pass a "
                "name or a callable num_classes -> nn.Module"
            ) from error
    if logits is None:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the sidekick must return floating-point logits, or an object or mapping with them "
            f"under 'logits', got {what}"
        )
    return logits


def check_no_probabilities(logits: Tensor, task: Task) -> None:
    """Raise ValueError if a sidekick for classes ends in softmax.

    Args:
        logits: What it gave.
        task: The task.
    """
    if not isinstance(task, Classes) or not logits.numel():
        return
    with torch.no_grad():
        total = logits.float().sum(task.dim)
        if bool((logits >= 0).all()) and bool((total - 1).abs().max() < 1e-3):
            raise ValueError(
                "the sidekick gives probabilities (numbers >= 0 that sum to 1 over the classes) "
                "where logits belong; take the softmax off its end"
            )
