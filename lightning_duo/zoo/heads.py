"""The layers of a model that give the class scores."""

from torch import nn


def final_layers(model: nn.Module, num_classes: int | None) -> list[nn.Module]:
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
    head: list[nn.Module] = final_layers(model, num_classes)
    if callable(getattr(model, "get_classifier", None)):
        named = model.get_classifier()  # type: ignore[operator]
        parts = named if isinstance(named, list | tuple | nn.ModuleList) else [named]
        head = [part for part in parts if isinstance(part, nn.Module)]
    wanted = {id(p) for part in head for p in part.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
