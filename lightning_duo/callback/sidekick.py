"""The sidekick of a run: when it is built, what it sees, and what keeps a model from being one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_duo.base import as_logits
from lightning_duo.batch import describe
from lightning_duo.isolation import own_stream
from lightning_duo.zoo import SidekickSource, build_sidekick, check_source, data_config


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
    config, size = data_config(sidekick), only_size(sidekick)
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
    transform = nn.Sequential(*steps)
    rank_zero_info(f"DuoCallback: the sidekick sees the base's inputs through {transform}")
    return transform


def only_size(sidekick: nn.Module) -> list[int] | None:
    """Height and width of images, if the model takes no other, as vision transformers state."""
    config = data_config(sidekick)
    size = getattr(sidekick, "image_size", None)  # torchvision's
    if config.get("fixed_input_size"):
        size = config["input_size"][-2:]
    return None if size is None else [size, size] if isinstance(size, int) else list(size)


def share_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether the models have memory of parameters or buffers in common."""

    def places(module: nn.Module) -> set[int]:
        tensors = [*module.parameters(), *module.buffers()]
        whole = (t for t in tensors if not isinstance(t, DTensor) and not is_lazy(t))
        return {t.untyped_storage().data_ptr() for t in whole} - {0}

    return bool(places(one) & places(other))


def check_model(model: nn.Module, base: nn.Module) -> None:
    """Find what keeps a model from being the sidekick of this base.

    Raises:
        MisconfigurationException: If they share parameters, or the model's parameters have no
            values or are on several devices.
    """
    if share_weights(model, base):
        raise MisconfigurationException(
            "base and sidekick share parameters; the sidekick must be a model of its own "
            "(copy.deepcopy it)"
        )
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


class Sidekick:
    """The sidekick of a run: built when the number of classes is known, with what it sees.

    Args:
        source: As `build_sidekick` takes it.
        num_classes: K, or None to take it from the base's first logits.
        pretrained: Whether a named model starts from published weights.
        weights: Local weights of a named model, or None.
        transform: From the base's inputs to the sidekick's; None to decide by `input_transform`.
    """

    def __init__(
        self,
        source: SidekickSource,
        *,
        num_classes: int | None,
        pretrained: bool,
        weights: str | Path | None,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        check_source(source, weights)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if transform is not None and not callable(transform):
            raise TypeError("sidekick_transform must be callable: inputs -> the sidekick's inputs")
        self.source, self.num_classes, self._given_classes = source, num_classes, num_classes
        self.pretrained, self.weights = pretrained, weights
        self.model: nn.Module | None = None
        self._transform = self._transform_given = transform
        self._first_weights: dict[str, Tensor] | None = None  # of a module that was given
        self._transform_known = transform is not None

    @property
    def name(self) -> str:
        """What a checkpoint remembers of the architecture."""
        if isinstance(self.source, str):
            return self.source
        if isinstance(self.source, nn.Module):
            return type(self.source).__name__
        return str(getattr(self.source, "__name__", "callable"))

    @property
    def pretrained_only(self) -> bool:
        """Whether a model just built has a head that knows nothing of the task."""
        return not isinstance(self.source, nn.Module) and self.weights is None

    def build(self, num_classes: int, base: nn.Module, *, pretrained: bool) -> nn.Module:
        """Build the model unless it exists; the global random streams do not notice.

        Raises:
            MisconfigurationException: If it cannot be a sidekick of this base; see `check_model`.
        """
        if self.model is not None:
            return self.model
        device = next((p.device for p in base.parameters()), torch.device("cpu"))
        with own_stream(device), torch.inference_mode(False), torch.enable_grad():
            model = build_sidekick(
                self.source,
                num_classes,
                pretrained=pretrained and self.pretrained,
                weights=self.weights if pretrained else None,
            )
        check_model(model, base)
        if self.num_classes is None and not isinstance(self.source, nn.Module):
            rank_zero_info(
                f"DuoCallback: sidekick {self.name!r} has {num_classes} classes, as the base's "
                "logits do"
            )
        self.model, self.num_classes = model, num_classes
        self.remember()
        return model

    def remember(self) -> None:
        """Keep the first weights of a model that was given, for `forget`; lazy ones have none."""
        model = self.model
        if model is None or self._first_weights is not None or model is not self.source:
            return
        if not any(map(is_lazy, model.parameters())):
            weights = model.state_dict()
            self._first_weights = {k: v.detach().cpu().clone() for k, v in weights.items()}

    @property
    def module(self) -> nn.Module | None:
        """The model, built or given; None as long as it is only a name or a callable."""
        given = self.source if isinstance(self.source, nn.Module) else None
        return given if self.model is None else self.model

    @property
    def transform_name(self) -> str | None:
        """What a checkpoint remembers of the transform that was given."""
        given = self._transform_given
        if given is None or isinstance(given, nn.Module):
            return None if given is None else repr(given)
        return str(getattr(given, "__qualname__", type(given)))

    def forget(self) -> None:
        """Drop a model that was trained beside another base, or give it its first weights again."""
        if self._first_weights is not None and self.model is not None:
            self.model.load_state_dict(self._first_weights)
            rank_zero_info(
                f"DuoCallback: in another run the sidekick {self.name!r} starts again from the "
                "weights that it had at first"
            )
        self.model, self.num_classes = None, self._given_classes
        self._transform = self._transform_given
        self._transform_known = self._transform is not None

    def inputs(self, base: nn.Module, inputs: Any) -> Any:
        """What the sidekick sees of the base's inputs; no gradient flows back into them."""
        inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
        if self.model is not None and not (self._transform_known and self._fits(inputs)):
            self._transform = input_transform(self.model, base, inputs)
            self._transform_known = True
        return inputs if self._transform is None else self._transform(inputs)

    def _fits(self, inputs: Any) -> bool:
        """Whether the transform is also one for images of this size, which may differ by loader."""
        resizes = self._transform_given is not None or self._resizes
        size = None if resizes or self.model is None else only_size(self.model)
        images = isinstance(inputs, Tensor) and inputs.ndim == 4
        return size is None or not images or list(inputs.shape[-2:]) == size

    @property
    def _resizes(self) -> bool:
        from torchvision.transforms import v2

        steps = self._transform if isinstance(self._transform, nn.Sequential) else ()
        return any(isinstance(step, v2.Resize) for step in steps)

    def deployable(self) -> nn.Module:
        """The model, behind its transform if it has one."""
        if self.model is None:
            raise RuntimeError("the sidekick has not been built yet")
        if self._transform is None:
            return self.model
        transform = self._transform
        first = transform if isinstance(transform, nn.Module) else _Callable(transform)
        return nn.Sequential(first, self.model)


class _Callable(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    @override
    def forward(self, x: Any) -> Any:
        return self.function(x)


def sidekick_logits(model: nn.Module, inputs: Any) -> Tensor:
    """Run the sidekick and return its logits (N, K).

    Raises:
        ValueError: If it cannot run these inputs, or returns something else.
    """
    try:
        output = model(inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model may raise
        seen = [describe(leaf) for leaf in tree_leaves(inputs)][:3]
        raise ValueError(
            f"the sidekick cannot run the base's inputs ({', '.join(seen)}): "
            f"{type(error).__name__}: {error}; pass DuoCallback(..., sidekick_transform=...) that "
            "makes of them what it takes, such as lambda x: x.expand(-1, 3, -1, -1) for gray "
            "images, or another sidekick"
        ) from error
    logits = as_logits(output)
    if logits is None:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the sidekick must return floating-point logits of shape (N, K), got {what}"
        )
    return logits
