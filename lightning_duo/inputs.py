"""What the sidekick sees of the base's call: resized, re-normalised, fitted to what it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_duo.base import Call, Fitting, as_module
from lightning_duo.plain import transform_of, transform_state
from lightning_duo.text import call_fitting
from lightning_duo.zoo import data_config


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


class Calling:
    """How the sidekick is called where the base was called.

    Args:
        model: The sidekick's model.
        base: The base.
        given: The user's transform of the first argument, or None.
        say: Tells the user what the inputs go through.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        given: Callable[[Any], Any] | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.base, self.say = model, base, say
        # Whether images are resized first -> what the inputs go through; known when first needed.
        self._transforms: dict[bool, Callable[[Any], Any] | None]
        self._transforms = {} if given is None else {False: given, True: given}
        self._fitting = Fitting(model)
        self._fits = True  # whether the model takes the base's calls as they are
        self._names: set[frozenset[str]] = set()  # of calls that the sidekick was fitted to

    def of(self, call: Call, part: nn.Module | None = None) -> Call:
        """The sidekick's call.

        Args:
            call: The base's.
            part: What of the base was called so; by default all of it.
        """
        names = frozenset(call.kwargs)
        if names not in self._names:
            self._names.add(names)
            self._learn(call, part or self.base)
        transform = self._transform_of(first_input(call))
        call = call if transform is None else with_first(call, transform)
        return self._fitting.call(call)

    def _learn(self, call: Call, base: nn.Module) -> None:
        """Find out what the model needs that is called where the base was called."""
        fitting = self._fitting
        dropped = call_fitting(self.model, call.args, call.kwargs, base=base).dropped
        for name in dropped:
            if name not in fitting.dropped:
                self.say(f"the sidekick is called without {name}, which it does not take")
        fitting.dropped.update(dropped)
        self._fits &= fitting.call(call) is call

    def _transform_of(self, inputs: Any) -> Callable[[Any], Any] | None:
        resized = self._must_resize(inputs)
        if resized not in self._transforms:
            found = self._transforms[resized] = input_transform(self.model, self.base, inputs)
            if found is not None:
                self.say(f"the sidekick sees the base's inputs through {found}")
        return self._transforms[resized]

    def _must_resize(self, inputs: Any) -> bool:
        """Whether these are images of another size than the only one that the model takes."""
        images = isinstance(inputs, Tensor) and inputs.ndim == 4
        size = _only_size(self.model) if images else None
        return size is not None and list(inputs.shape[-2:]) != size

    def deployable(self) -> nn.Module:
        """The model, behind what makes the base's call its own."""
        model = self.model
        if not self._fits:
            model = self._fitting
        if self._transform is None:
            return model
        return Transformed(as_module(self._transform), model)

    @property
    def _transform(self) -> Callable[[Any], Any] | None:
        """What the inputs go through; one that resizes does for images of both kinds."""
        return self._transforms.get(True, self._transforms.get(False))

    def state(self) -> dict[str, Any]:
        """What was learnt, in plain types; without a transform that these cannot tell."""
        return {
            "dropped": sorted(self._fitting.dropped),
            "fits": self._fits,
            "transform": transform_state(self._transform),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Call the sidekick as it was called when the state was taken."""
        self._fitting.dropped.update(state["dropped"])
        self._fits = state["fits"]
        if not self._transforms:
            known = state["transform"] and transform_of(state["transform"])
            self._transforms = {False: known, True: known}


class Transformed(nn.Sequential):
    """A transform of the first argument of a call, and the model that is called with the result."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        transform, model = self
        return with_first(Call(args, kwargs), transform).of(model)


def first_input(call: Call) -> Any:
    """The first argument of a call; None if it has none."""
    return next(iter((*call.args, *call.kwargs.values())), None)


def with_first(call: Call, change: Callable[[Any], Any]) -> Call:
    """A call with another first argument."""
    if call.args:
        return Call((change(call.args[0]), *call.args[1:]), call.kwargs)
    changed = {name: change(value) for name, value in list(call.kwargs.items())[:1]}
    return Call((), {**call.kwargs, **changed})
