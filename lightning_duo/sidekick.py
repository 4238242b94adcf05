"""The sidekick: how it is built, what it sees, and how it is fine-tuned beside the base."""

import difflib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from lightning_duo.batch import as_logits

SidekickSource: TypeAlias = str | nn.Module | Callable[[int], nn.Module]
OptimizerFn: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFn: TypeAlias = Callable[[Optimizer], LRScheduler]

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
    if not known:
        near = difflib.get_close_matches(source.split(".")[0], names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is like it"
        raise ValueError(
            f"no model is called {source!r}: {hint} A sidekick is a timm name "
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
        The module, mapping inputs to logits (N, num_classes).

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
        model = _named(source, num_classes, download)
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
        load_backbone(model, _read_state(Path(weights)), str(weights))
    return model


def _named(source: str, num_classes: int, pretrained: bool) -> nn.Module:
    if not source.startswith(TORCHVISION):
        import timm

        model: nn.Module = timm.create_model(source, pretrained, num_classes=num_classes)
        return model
    import torchvision.models as zoo

    name = source.removeprefix(TORCHVISION)
    vision: nn.Module = zoo.get_model(name, num_classes=num_classes)
    if pretrained:
        published = zoo.get_model_weights(name).DEFAULT
        load_backbone(vision, published.get_state_dict(check_hash=True), source)
    return vision


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return dict(state)


def load_backbone(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict; only a head for another number of classes may be left out.

    Args:
        model: Module with the wanted head.
        state: State dict of the same architecture.
        origin: Where the state comes from, for the error.

    Raises:
        ValueError: If anything but the head is missing, left over or of another shape.
    """
    own = model.state_dict()
    differing = {key for key in own if key in state and own[key].shape != state[key].shape}
    head = {name for name, _ in _head_parameters(model)}
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


def _head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the final classifier: timm names it, else the last linear layer is it."""
    head: Any = None
    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()
    else:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        head = layers[-1] if layers else None
    parts = head if isinstance(head, list | tuple | nn.ModuleList) else [head]
    wanted = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
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
    config = getattr(sidekick, "pretrained_cfg", None) or {}
    size = getattr(sidekick, "image_size", None)  # torchvision's vision transformers
    if config.get("fixed_input_size"):
        size = config["input_size"][-2:]
    if size is not None:
        wanted = [size, size] if isinstance(size, int) else list(size)
        if wanted != list(inputs.shape[-2:]):
            steps.append(v2.Resize(wanted, antialias=True))
    stated = [
        part.pretrained_cfg
        for part in base.modules()
        if isinstance(getattr(part, "pretrained_cfg", None), dict)
    ]
    if len(stated) == 1 and config.get("mean") and stated[0].get("mean"):
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


@dataclass(frozen=True)
class Recipe:
    """How the sidekick is fine-tuned: linear probe of the head, then all of it (paper, A.2)."""

    probe: float = 0.3
    """Fraction of the optimizer steps that train the head only (paper: 8 of 28, 5 of 15 epochs)."""
    optimizer: OptimizerFn | None = None
    """Parameters -> optimizer, in both phases; None: AdamW, lr 1e-3 (probe) and 1e-4."""
    lr_scheduler: SchedulerFn | None = None
    """Optimizer -> scheduler, stepped after every optimizer step, made anew for each phase; None:
    linear warm-up over 5 % of the phase, then cosine to 0."""

    def make_optimizer(self, parameters: list[nn.Parameter], *, probing: bool) -> Optimizer:
        """Optimizer of one phase."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return AdamW(parameters, lr=1e-3 if probing else 1e-4, weight_decay=1e-6)

    def make_scheduler(self, optimizer: Optimizer, steps: int | None) -> LRScheduler:
        """Scheduler of a phase of that many optimizer steps; None if it has no known end."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler(optimizer)
        warmup = 100 if steps is None else max(1, round(0.05 * steps))
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        if steps is None:
            return rise
        fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
        return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


class SidekickTrainer:
    """Trains the sidekick inside someone else's training loop, without a trace in it.

    It steps when the base's optimizer has stepped, uses the Trainer's precision, gradient
    clipping and gradient averaging, and leaves the global random streams as they were.

    Args:
        model: The sidekick.
        recipe: How to train it.
        trainer: The user's Trainer; training is about to start.
        state: What `state_dict` gave, to go on from there.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, trainer: Trainer, state: dict[str, Any] | None
    ) -> None:
        self.model, self.recipe, self.trainer = model, recipe, trainer
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        if not self._trainable:
            raise MisconfigurationException(
                "the sidekick has no trainable parameters; call requires_grad_(True) on it, or "
                "fit only the temperatures with trainer.validate"
            )
        self.updates = self.batches = 0
        self.seed = torch.initial_seed()
        self.total = self._total_updates()
        head = {id(p) for _, p in _head_parameters(model)}
        self._head = [p for p in self._trainable if id(p) in head]
        self.probe_updates = round(recipe.probe * (self.total or 0)) if self._head else 0
        if recipe.probe and not self.probe_updates and not self._head:
            rank_zero_info("DuoCallback: no final linear layer found, so there is no linear probe")
        mixed_half = getattr(trainer.precision_plugin, "scaler", None) is not None
        self.scaler = torch.amp.GradScaler(trainer.strategy.root_device.type, enabled=mixed_half)
        if state is not None:
            self.updates, self.batches = state["updates"], state["batches"]
            self.probe_updates, self.seed = state["probe_updates"], state["seed"]
        self._enter_phase()
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])

    @property
    def probing(self) -> bool:
        """Whether only the head is being trained."""
        return self.updates < self.probe_updates

    def _total_updates(self) -> int | None:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            rank_zero_warn(
                "DuoCallback: the Trainer does not know when training ends (max_epochs=-1 and no "
                "max_steps), so the sidekick trains without a linear probe at a constant learning "
                "rate; set max_epochs or max_steps for the full recipe"
            )
            return None
        return max(1, int(total))

    def _enter_phase(self) -> None:
        probing = self.probing
        parameters = self._head if probing else self._trainable
        for p in self._trainable:
            p.requires_grad_(not probing)
            p.grad = None
        for p in parameters:
            p.requires_grad_(True)
        steps = self.probe_updates if probing else self.total and self.total - self.probe_updates
        self.optimizer = self.recipe.make_optimizer(parameters, probing=probing)
        self.scheduler = self.recipe.make_scheduler(self.optimizer, steps)
        self._parallel: nn.Module = self.model
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and isinstance(strategy, DDPStrategy):
            self._parallel = DistributedDataParallel(
                self.model, device_ids=strategy.determine_ddp_device_ids()
            )

    def step(self, inputs: Any, targets: Tensor, *, update: bool) -> Tensor:
        """Learn from a batch.

        Args:
            inputs: The sidekick's inputs, already transformed.
            targets: True classes, shape (N,), int64.
            update: Whether this batch ends an accumulation window.

        Returns:
            Cross-entropy in nats per sample, detached.
        """
        # In the probe the features are frozen: normalisation statistics and dropout too.
        self.model.train(not self.probing)
        sync = self._parallel.no_sync if hasattr(self._parallel, "no_sync") and not update else None
        with isolate_rng(include_cuda=self.trainer.strategy.root_device.type == "cuda"):
            # A stream of its own, the same after a resume, and different on every rank.
            step_seed = self.batches * self.trainer.world_size + self.trainer.global_rank
            torch.manual_seed((self.seed + 1_000_003 * step_seed) % 2**63)
            with sync() if sync else nullcontext():
                with self.trainer.precision_plugin.train_step_context():
                    logits = sidekick_logits(self._parallel, inputs)
                    loss = nn.functional.cross_entropy(logits.float(), targets)
                accumulated = loss / self.trainer.accumulate_grad_batches
                self.scaler.scale(accumulated).backward()
        self.batches += 1
        if update:
            self._update()
        return loss.detach()

    def _update(self) -> None:
        if self.trainer.gradient_clip_val:
            self.scaler.unscale_(self.optimizer)
            self.trainer.precision_plugin.clip_gradients(
                self.optimizer,
                self.trainer.gradient_clip_val,
                GradClipAlgorithmType(self.trainer.gradient_clip_algorithm or "norm"),
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        was_probing = self.probing
        self.updates += 1
        if was_probing and not self.probing:
            self._enter_phase()
        else:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only; the model's weights are not among them."""
        return {
            "updates": self.updates,
            "batches": self.batches,
            "seed": self.seed,
            "probe_updates": self.probe_updates,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


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
