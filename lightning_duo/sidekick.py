"""The sidekick: how it is built and what it sees."""

import difflib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_duo.batch import as_logits
from lightning_duo.randomness import own_stream

SidekickSource: TypeAlias = str | nn.Module | Callable[[int], nn.Module]

TORCHVISION = "torchvision/"
REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")


def check_source(source: SidekickSource, weights: str | Path | None) -> None:
    """Find what is wrong with a sidekick before anything is built.

    Args:
        source: As `build_sidekick` takes it.
        weights: Local weights file, or None.

    Raises:
        ValueError: If no model has that name; the message suggests names like it.
        FileNotFoundError: If the weights file does not exist.
        TypeError: If the source is none of the supported kinds.
    """
    if weights is not None and not isinstance(source, str):
        raise ValueError("weights= goes with a model name; load them into your own sidekick")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"the sidekick's weights file {str(weights)!r} does not exist")
    if not isinstance(source, str):
        if not isinstance(source, nn.Module) and not callable(source):
            raise TypeError(
                "sidekick must be a timm name, 'torchvision/<name>', an nn.Module, or a callable "
                f"num_classes -> nn.Module; got {type(source).__name__}"
            )
        return
    if source.startswith(REMOTE):
        return
    if source.startswith(TORCHVISION):
        import torchvision.models as zoo

        # Classifiers only: detection and segmentation models live in named submodules.
        names = [TORCHVISION + name for name in zoo.list_models(module=zoo)]
        known = source in names
    else:
        import timm

        names = timm.list_models()
        known = timm.is_model(source)
        tagged = timm.list_pretrained(f"{source.split('.')[0]}.*") if "." in source else []
        if known and "." in source and source not in tagged:
            raise ValueError(
                f"timm has no weights called {source!r}; it has {', '.join(tagged) or 'none'}"
            )
    if not known:
        if not source.startswith(TORCHVISION):
            import torchvision.models as zoo

            names = [*names, *(TORCHVISION + name for name in zoo.list_models(module=zoo))]
        near = [name for name in names if name.removeprefix(TORCHVISION) == source]
        near = near or difflib.get_close_matches(source.split(".")[0], names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is like it."
        raise ValueError(
            f"no model is called {source!r}: {hint} A model is a timm name "
            "(timm.list_models()) or 'torchvision/<name>' (torchvision.models.list_models())"
        )


def build_sidekick(
    source: SidekickSource,
    num_classes: int,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
) -> nn.Module:
    """Build a sidekick with ``num_classes`` outputs.

    Args:
        source: A timm name, ``"torchvision/<name>"``, a module, or a callable
            ``num_classes -> nn.Module``.
        num_classes: K, the base's number of classes.
        pretrained: Whether a named model starts from published weights (downloaded or cached).
        weights: Local file to start from instead: safetensors, or a state dict saved by torch. A
            head for another number of classes is left out and starts fresh.

    Returns:
        The module, mapping inputs to logits (N, num_classes). A new head starts from zero.

    Raises:
        ValueError: If the name is unknown or the weights do not fit the architecture.
        RuntimeError: If published weights cannot be had, with the ways out.

    Example:
        >>> sidekick = build_sidekick("resnet18", 10, pretrained=False)
        >>> sidekick.fc.out_features
        10

    Source: Asymmetric Duos, App. A.1 (torchvision and timm as the model zoos).
    """
    check_source(source, weights)
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str):
        model = source(num_classes)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the sidekick callable must return an nn.Module, got {type(model).__name__}"
            )
        return model
    download = pretrained and weights is None
    try:
        model, trained_head = _named(source, num_classes, download)
    except Exception as error:
        if not download:
            raise
        raise RuntimeError(
            f"could not get pretrained weights for the sidekick {source!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Without a network, either pass weights='<local safetensors or state dict>', or "
            "pretrained=False to train it from scratch"
        ) from error
    if weights is not None:
        trained_head = load_backbone(model, _read_state(Path(weights)), str(weights))
    if not trained_head:
        # A linear probe starts from no opinion; some architectures draw heads so large that a
        # short probe could not undo them.
        for layer in _final_layers(model, num_classes):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    return model


def _named(source: str, num_classes: int, pretrained: bool) -> tuple[nn.Module, bool]:
    """Build a model of a zoo; also whether its head is a trained one."""
    if not source.startswith(TORCHVISION):
        import timm

        model: nn.Module = timm.create_model(source, pretrained, num_classes=num_classes)
        return model, pretrained and _data_config(model).get("num_classes") == num_classes
    import torchvision.models as zoo

    name = source.removeprefix(TORCHVISION)
    vision: nn.Module = zoo.get_model(name, num_classes=num_classes)
    if not pretrained:
        return vision, False
    published = zoo.get_model_weights(name).DEFAULT
    return vision, load_backbone(vision, published.get_state_dict(check_hash=True), source)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"the weights in {path} are more than tensors, so they are not loaded; save the "
            f"model's state_dict() instead ({str(error).splitlines()[0]})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds no state dict (name -> tensor), but a {type(state).__name__}"
        )
    # Left by DistributedDataParallel and torch.compile.
    return {key.removeprefix("module.").removeprefix("_orig_mod."): v for key, v in state.items()}


def load_backbone(model: nn.Module, state: dict[str, Tensor], origin: str) -> bool:
    """Load a state dict; only a head for another number of classes may be left out.

    Args:
        model: Module with the wanted head.
        state: State dict of the same architecture.
        origin: Where the state comes from, for the error.

    Returns:
        Whether the head was loaded too.

    Raises:
        ValueError: If anything but the head is missing, left over or of another shape.
    """
    own = model.state_dict()
    differing = {key for key in own if key in state and own[key].shape != state[key].shape}
    head = {name for name, _ in head_parameters(model)}
    # Auxiliary classifiers (googlenet, inception) end in class scores too.
    resized = {key for key in differing if key in head or "aux" in key.lower()}
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    wrong = sorted(differing - resized)
    if missing or unexpected or wrong:
        raise ValueError(
            f"the weights in {origin} do not fit {type(model).__name__}: "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unknown "
            f"{unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in resized}, strict=False)
    return not resized


def _final_layers(model: nn.Module, num_classes: int | None) -> list[nn.Module]:
    """Layers that give the class scores: linear, or convolutions in some architectures.

    Those of timm's classifier, which may hold hidden layers and several heads too; else the last
    of the model.
    """

    def outputs(module: nn.Module) -> list[nn.Module]:
        layers: list[nn.Module] = [
            m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        if num_classes is None:
            return layers[-1:]
        widths = [getattr(m, "out_features", getattr(m, "out_channels", 0)) for m in layers]
        return [m for m, width in zip(layers, widths, strict=True) if width == num_classes]

    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        parts = head if isinstance(head, list | tuple | nn.ModuleList) else [head]
        return [layer for part in parts if isinstance(part, nn.Module) for layer in outputs(part)]
    return outputs(model)[-1:]


def head_parameters(
    model: nn.Module, num_classes: int | None = None
) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the classifier: timm names it; else it is the last linear layer with K outputs.

    Args:
        model: The sidekick.
        num_classes: K; None takes the last linear layer whatever its outputs.
    """
    head: list[nn.Module] = _final_layers(model, num_classes)
    if callable(getattr(model, "get_classifier", None)):
        named = model.get_classifier()  # type: ignore[operator]
        parts = named if isinstance(named, list | tuple | nn.ModuleList) else [named]
        head = [part for part in parts if isinstance(part, nn.Module)]
    wanted = {id(p) for part in head for p in part.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]


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
    config = _data_config(sidekick)
    size = getattr(sidekick, "image_size", None)  # torchvision's vision transformers
    if config.get("fixed_input_size"):
        size = config["input_size"][-2:]
    if size is not None:
        wanted = [size, size] if isinstance(size, int) else list(size)
        if wanted != list(inputs.shape[-2:]):
            steps.append(v2.Resize(wanted, antialias=True))
    stated = [found for part in base.modules() if (found := _data_config(part))]
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


def _data_config(model: nn.Module) -> dict[str, Any]:
    """What timm says of the images a model was trained on; empty for other models."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def check_model(model: nn.Module, base: nn.Module) -> None:
    """Find what keeps a model from being the sidekick of this base.

    Raises:
        MisconfigurationException: If they share parameters, or the model's parameters have no
            values or are on several devices.
    """
    own = {id(p) for p in model.parameters()}
    if any(id(p) in own for p in base.parameters()):
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
        self._transform = transform
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
        return model

    @property
    def module(self) -> nn.Module | None:
        """The model, built or given; None as long as it is only a name or a callable."""
        given = self.source if isinstance(self.source, nn.Module) else None
        return given if self.model is None else self.model

    def forget(self) -> None:
        """Drop a model that was built for another base; a module of the user's own stays."""
        if not isinstance(self.source, nn.Module):
            self.model, self.num_classes = None, self._given_classes

    def inputs(self, base: nn.Module, inputs: Any) -> Any:
        """What the sidekick sees of the base's inputs; no gradient flows back into them."""
        inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
        if not self._transform_known and self.model is not None:
            self._transform = input_transform(self.model, base, inputs)
            self._transform_known = True
        return inputs if self._transform is None else self._transform(inputs)

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
        ValueError: If it returns something else.
    """
    output = model(inputs)
    logits = as_logits(output)
    if logits is None:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the sidekick must return floating-point logits of shape (N, K), got {what}"
        )
    return logits
