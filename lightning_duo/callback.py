"""`DuoCallback`: a sidekick for any LightningModule that classifies."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_duo.batch import (
    BaseLogits,
    BatchFn,
    LogitsFn,
    call_base,
    check_targets,
    evaluating,
    has_forward,
    read_batch,
)
from lightning_duo.cost import count_flops
from lightning_duo.metrics import DuoMetrics
from lightning_duo.module import DuoModule
from lightning_duo.sidekick import (
    OptimizerFn,
    Recipe,
    SchedulerFn,
    SidekickSource,
    SidekickTrainer,
    build_sidekick,
    check_source,
    input_transform,
    sidekick_logits,
)
from lightning_duo.temperature import TemperatureFit, Temperatures, fit_temperatures

LOGGED = ("base", "base_scaled", "sidekick", "duo")
STATE_VERSION = 1


class DuoCallback(Callback):
    """Fine-tunes a small sidekick beside your model and makes the two a calibrated duo.

    During fit the sidekick learns from the batches your model sees. At the end of every
    validation the two temperatures are fitted to the validation set, and metrics are logged as
    ``{base|base_scaled|sidekick|duo}/{val|test}_{metric}`` (accuracy, f1, nll, brier, ece, auroc,
    aurc, sac98) with ``duo/temperature_base`` and ``duo/temperature_sidekick``; the val metrics of
    the fitted forms are thus measured on the set that fitted two numbers. `Trainer.test` evaluates
    with the fitted temperatures and never refits. Your module, its optimizer and its random
    numbers are left as they would be without the callback.

    With several dataloaders the first validation loader fits; the metrics of further loaders have
    ``/dataloader_idx_<i>`` behind their names.

    Args:
        sidekick: A timm name ("resnet34"), "torchvision/<name>", an ``nn.Module``, or a callable
            ``num_classes -> nn.Module``.
        num_classes: K; by default taken from the first logits of the base.
        pretrained: Whether a named sidekick starts from published weights.
        weights: Local weights of a named sidekick (safetensors or a state dict) instead.
        sidekick_transform: From the base's inputs to the sidekick's, on the device, for example
            ``torchvision.transforms.v2.Resize(96)``. By default inputs are resized if the sidekick
            takes one size only, and re-normalised if both models state how they normalise.
        batch_fn: ``batch -> (inputs, targets)``, for batches that are neither a tuple nor a mapping
            with usual keys.
        logits_fn: ``(module, inputs) -> logits (N, K)``, for modules whose step and forward do not
            give the logits.
        probe: Fraction of the training that trains the sidekick's head only.
        optimizer: ``parameters -> Optimizer``; by default AdamW.
        lr_scheduler: ``optimizer -> scheduler``, stepped with the optimizer; by default linear
            warm-up, then cosine.
        summary: Whether to print a table of what was gained after fit.

    Raises:
        ValueError: If no model is called ``sidekick``, or an argument is out of range.
        FileNotFoundError: If the weights file does not exist.

    Example:
        >>> DuoCallback(sidekick="resnet34", pretrained=False).results
        {}

    Source: Asymmetric Duos, Sec. 3.1 and App. A.2.
    """

    def __init__(
        self,
        sidekick: SidekickSource,
        *,
        num_classes: int | None = None,
        pretrained: bool = True,
        weights: str | Path | None = None,
        sidekick_transform: Any = None,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
        probe: float = 0.3,
        optimizer: OptimizerFn | None = None,
        lr_scheduler: SchedulerFn | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__()
        check_source(sidekick, weights)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= probe <= 1:
            raise ValueError(f"probe must be a fraction of the training in [0, 1], got {probe}")
        if sidekick_transform is not None and not callable(sidekick_transform):
            raise TypeError("sidekick_transform must be callable: inputs -> the sidekick's inputs")
        self.source, self.num_classes = sidekick, num_classes
        self.pretrained, self.weights = pretrained, weights
        self.batch_fn = batch_fn or read_batch
        self.recipe = Recipe(probe, optimizer, lr_scheduler)
        self.summary = summary
        self.fit: TemperatureFit | None = None
        """The last temperature fit; None before the first validation."""
        self.fitted_at_step = -1
        """The Trainer's global step at that fit."""
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        """Stage ("val", "test") -> model -> metric -> value, of the last run; see `DuoMetrics`."""
        self.balance: float | None = None
        """FLOPs of the sidekick over those of the base, known after fit."""
        self._base: LightningModule | None = None
        self._base_logits = BaseLogits(logits_fn)
        self._sidekick: nn.Module | None = None
        self._transform = sidekick_transform
        self._transform_is_known = sidekick_transform is not None
        self._training: SidekickTrainer | None = None
        self._training_state: dict[str, Any] | None = None
        self._example: Tensor | None = None
        self._seen_step = 0
        self._collected: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._metrics: dict[int, DuoMetrics] = {}

    @property
    def module(self) -> DuoModule:
        """The duo as it is now: a deep copy in eval mode, which later training leaves alone.

        Raises:
            MisconfigurationException: If no temperatures were fitted yet.
            ValueError: If the base's logits can be computed neither by its forward nor by
                ``logits_fn``.
        """
        if self.fit is None or self._base is None or self._sidekick is None:
            raise MisconfigurationException(
                "there is no duo yet: no temperatures were fitted; run trainer.fit with validation "
                "data, or trainer.validate"
            )
        logits_fn = self._base_logits.logits_fn
        if logits_fn is None and not has_forward(self._base):
            raise ValueError(
                f"{type(self._base).__name__} has no forward, so the duo cannot call it; define "
                "forward(x) or pass DuoCallback(..., logits_fn=lambda module, inputs: ...)"
            )
        self._base_logits.unwatch()
        base = self._base if logits_fn is None else _Through(logits_fn, self._base)
        sidekick = self._sidekick
        if self._transform is not None:
            sidekick = nn.Sequential(_as_module(self._transform), sidekick)
        # One deepcopy keeps what the two may share.
        base, sidekick = copy.deepcopy((base, sidekick))
        duo = DuoModule(base, sidekick, self.fit.temperatures)
        duo.temperatures = duo.temperatures.to(self._base.device)
        duo.threshold = duo.threshold.to(self._base.device)
        return duo.requires_grad_(False).eval()

    # ---- set-up ----

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._base = pl_module
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"DuoCallback runs on one device or with DDP, not with "
                f"{type(trainer.strategy).__name__}: the base's weights must be whole on each "
                'process; use Trainer(strategy="ddp")'
            )
        if stage == "fit" and not trainer.enable_validation:
            if trainer.limit_val_batches == 0:
                rank_zero_warn(
                    "DuoCallback: limit_val_batches=0, so no temperatures will be fitted; run "
                    "trainer.validate afterwards"
                )
            else:
                raise MisconfigurationException(
                    "DuoCallback fits its temperatures on validation data, but there is no "
                    "validation: give the Trainer a val_dataloader and the module a "
                    "validation_step"
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.num_classes is not None:
            self._build(trainer, pl_module, self.num_classes)

    def _build(self, trainer: Trainer, pl_module: LightningModule, num_classes: int) -> nn.Module:
        """Build the sidekick on first need, and bring it to the base's device and precision."""
        if self._sidekick is None:
            with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
                self._sidekick = build_sidekick(
                    self.source, num_classes, pretrained=self.pretrained, weights=self.weights
                )
            self._check_separate(pl_module, self._sidekick)
            self.num_classes = num_classes
        with torch.inference_mode(False):
            self._sidekick = trainer.precision_plugin.convert_module(self._sidekick)
            return self._sidekick.to(pl_module.device)

    def _check_separate(self, base: nn.Module, sidekick: nn.Module) -> None:
        shared = {id(p) for p in base.parameters()} & {id(p) for p in sidekick.parameters()}
        if shared:
            raise MisconfigurationException(
                f"base and sidekick share {len(shared)} parameters; the sidekick must be a model "
                "of its own (copy.deepcopy it)"
            )

    def _read(self, batch: Any) -> tuple[Any, Tensor]:
        inputs, targets = self.batch_fn(batch)
        if not isinstance(targets, Tensor):
            raise ValueError(
                f"batch_fn must return (inputs, targets tensor), got {type(targets).__name__}"
            )
        return inputs, targets

    def _sidekick_inputs(self, inputs: Any) -> Any:
        if not self._transform_is_known:
            assert self._sidekick is not None and self._base is not None
            self._transform = input_transform(self._sidekick, self._base, inputs)
            self._transform_is_known = True
        return inputs if self._transform is None else self._transform(inputs)

    # ---- training ----

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.num_classes is None:
            self._base_logits.watch(pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        inputs, targets = self._read(batch)
        first = self._training is None
        if first:
            self._begin(trainer, pl_module, outputs, inputs, targets)
        assert self._training is not None and self.num_classes is not None
        # Reading values back from an accelerator stalls it, so later batches rely on the loss.
        check_targets(targets, self.num_classes, values=first or targets.device.type == "cpu")
        update = trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        loss = self._training.step(self._sidekick_inputs(inputs), targets.long(), update=update)
        pl_module.log("sidekick/train_nll", loss, prog_bar=True, on_step=True, on_epoch=False)

    def _begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        inputs: Any,
        targets: Tensor,
    ) -> None:
        if self.num_classes is None:
            with isolate_rng():
                logits = self._base_logits.of(pl_module, outputs, inputs, targets)
            self._base_logits.unwatch()
            self._build(trainer, pl_module, logits.shape[1])
        sidekick = self._build(trainer, pl_module, self.num_classes or 0)
        self._training = SidekickTrainer(sidekick, self.recipe, trainer, self._training_state)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fit is None and trainer.limit_val_batches != 0:
            rank_zero_warn(
                "DuoCallback: training ended before any validation, so no temperatures were "
                "fitted; run trainer.validate"
            )
        if self._example is not None and self._sidekick is not None and trainer.is_global_zero:
            self.balance = self._flops_balance(pl_module, self._sidekick, self._example)

    def _flops_balance(
        self, base: LightningModule, sidekick: nn.Module, example: Tensor
    ) -> float | None:
        try:
            with isolate_rng():
                base_flops = count_flops(base, example, self._base_logits.logits_fn or call_base)
                sidekick_flops = count_flops(sidekick, self._sidekick_inputs(example))
        except Exception as error:  # the user's forward may want more than a batch of one
            rank_zero_warn(f"DuoCallback: could not count the base's FLOPs: {error}")
            return None
        return sidekick_flops / base_flops if base_flops else None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.summary and self.fit is not None and "val" in self.results:
            self._print_summary()

    @rank_zero_only
    def _print_summary(self) -> None:
        from rich.console import Console

        from lightning_duo.report import summary_table

        assert self.fit is not None
        shown = {model: self.results["val"][model] for model in LOGGED}
        data = "the validation set (which fitted the temperatures)"
        Console().print(summary_table(shown, self.fit, data=data, balance=self.balance))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._base_logits.unwatch()
        self._collected.clear()
        self._metrics.clear()
        if self._training is not None:
            self._training_state = self._training.state_dict()
            self._training = None
        if self._sidekick is not None:
            self._sidekick.to(pl_module.device)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._base_logits.unwatch()

    # ---- evaluation ----

    def _logits(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both models (N, K) and targets (N,) of a batch, on the CPU."""
        inputs, targets = self._read(batch)
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            base = self._base_logits.of(pl_module, outputs, inputs, targets)
            if self.num_classes is not None and base.shape[1] != self.num_classes:
                raise ValueError(
                    f"the base gives {base.shape[1]} classes but the sidekick was built for "
                    f"{self.num_classes}; pass DuoCallback(..., num_classes={base.shape[1]})"
                )
            model = self._build(trainer, pl_module, base.shape[1])
            targets = check_targets(targets, base.shape[1])
            with evaluating(model), trainer.precision_plugin.val_step_context():
                sidekick = sidekick_logits(model, self._sidekick_inputs(inputs))
        if sidekick.shape != base.shape:
            raise ValueError(
                f"the sidekick {self._name!r} gives logits {tuple(sidekick.shape)} but the base "
                f"{tuple(base.shape)}: give it a head with {base.shape[1]} outputs, or pass a name "
                "or a callable num_classes -> nn.Module"
            )
        if isinstance(inputs, Tensor) and len(inputs):
            self._example = inputs[:1].detach()
        return base.float().cpu(), sidekick.float().cpu(), targets.cpu()

    @property
    def _name(self) -> str:
        if isinstance(self.source, str):
            return self.source
        if isinstance(self.source, nn.Module):
            return type(self.source).__name__
        return "callable"

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collected.clear()
        self._base_logits.watch(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits = self._logits(trainer, pl_module, outputs, batch)
        if not trainer.sanity_checking:
            self._collected.setdefault(dataloader_idx, []).append(logits)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._base_logits.unwatch()
        if trainer.sanity_checking:
            return
        if self._training is None and self._training_state is None and self._fresh_head:
            rank_zero_warn(
                "DuoCallback: the sidekick was not fine-tuned (no fit, no ckpt_path), so its head "
                "is random and the duo is little more than the temperature-scaled base"
            )
        samples = self._gather_loaders(len(trainer.num_val_batches))
        self.fit = fit_temperatures(*samples[0], reduce=_sum_over_processes(trainer, pl_module))
        self.fitted_at_step = trainer.global_step
        if self.fit.status == "separable":
            rank_zero_warn(
                "DuoCallback: both models together separate the validation set without error, so "
                "no finite temperatures are best and confidences will be near 1; validate on more "
                "samples"
            )
        for index, (base, sidekick, targets) in samples.items():
            metrics = self._new_metrics()
            rows = max(1, (1 << 22) // base.shape[1])
            for start in range(0, len(targets), rows):
                chunk = slice(start, start + rows)
                metrics.update(base[chunk], sidekick[chunk], targets[chunk])
            self._log(pl_module, "val", index, metrics)
        pl_module.log("duo/temperature_base", self.fit.temperatures.base)
        pl_module.log("duo/temperature_sidekick", self.fit.temperatures.sidekick)
        self._collected.clear()

    @property
    def _fresh_head(self) -> bool:
        return isinstance(self.source, str) and self.weights is None

    def _gather_loaders(self, loaders: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """All logits and targets of this process; a process without samples has empty ones."""
        samples = {index: _no_samples(self.num_classes) for index in range(loaders)}
        for index, batches in self._collected.items():
            base, sidekick, targets = (torch.cat(part) for part in zip(*batches, strict=True))
            samples[index] = (base, sidekick, targets)
        return samples

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fit is None:
            raise MisconfigurationException(
                "DuoCallback cannot test without temperatures: run trainer.fit or trainer.validate "
                "first, or pass trainer.test(ckpt_path=...) a checkpoint saved after a validation"
            )
        self._metrics = {i: self._new_metrics() for i in range(len(trainer.num_test_batches))}
        self._base_logits.watch(pl_module)

    def _new_metrics(self) -> DuoMetrics:
        assert self.fit is not None and self.num_classes is not None
        metrics = DuoMetrics(self.num_classes, self.fit)
        # A process that gets no sample must still have something to exchange with the others.
        metrics.update(*_no_samples(self.num_classes))
        return metrics

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits = self._logits(trainer, pl_module, outputs, batch)
        self._metrics[dataloader_idx].update(*logits)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._base_logits.unwatch()
        for index, metrics in sorted(self._metrics.items()):
            self._log(pl_module, "test", index, metrics)

    def _log(self, pl_module: LightningModule, stage: str, index: int, metrics: DuoMetrics) -> None:
        results = metrics.to(pl_module.device).compute()
        suffix = f"/dataloader_idx_{index}" if index else ""
        self.results[stage + suffix] = results
        for model in LOGGED:
            for metric, value in results[model].items():
                pl_module.log(f"{model}/{stage}_{metric}{suffix}", value)

    # ---- checkpoints ----

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._sidekick is None:
            return {}
        training = self._training.state_dict() if self._training else self._training_state
        return {
            "version": STATE_VERSION,
            "name": self._name,
            "num_classes": self.num_classes,
            "sidekick": self._sidekick.state_dict(),
            "training": training,
            "fit": None if self.fit is None else _plain(self.fit),
            "fitted_at_step": self.fitted_at_step,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["version"] != STATE_VERSION:
            raise ValueError(
                f"the checkpoint holds duo state of version {state_dict['version']}; this "
                f"lightning_duo reads version {STATE_VERSION}"
            )
        mine = (self._name, self.num_classes or state_dict["num_classes"])
        saved = (state_dict["name"], state_dict["num_classes"])
        if mine != saved:
            raise ValueError(
                f"the checkpoint's sidekick is {saved[0]!r} with {saved[1]} classes, this "
                f"callback's is {mine[0]!r} with {mine[1]}; make them the same, or load the "
                "checkpoint without DuoCallback"
            )
        self.num_classes = state_dict["num_classes"]
        if self._sidekick is None:
            with isolate_rng():  # no download: the weights are in the checkpoint
                self._sidekick = build_sidekick(self.source, saved[1], pretrained=False)
        self._sidekick.load_state_dict(state_dict["sidekick"])
        self._training_state = state_dict["training"]
        self.fit = None if state_dict["fit"] is None else _unplain(state_dict["fit"])
        self.fitted_at_step = state_dict["fitted_at_step"]
        if self._training is None:
            rank_zero_info(f"DuoCallback: sidekick {saved[0]!r} restored from the checkpoint")


class _Through(nn.Module):
    """A base whose logits the user's ``logits_fn`` computes."""

    def __init__(self, logits_fn: LogitsFn, module: nn.Module) -> None:
        super().__init__()
        self.logits_fn, self.module = logits_fn, module

    @override
    def forward(self, x: Any) -> Tensor:
        return self.logits_fn(self.module, x)


class _Transform(nn.Module):
    """A plain callable as a module."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    @override
    def forward(self, x: Any) -> Any:
        return self.transform(x)


def _no_samples(num_classes: int | None) -> tuple[Tensor, Tensor, Tensor]:
    classes = num_classes or 1
    return torch.zeros(0, classes), torch.zeros(0, classes), torch.zeros(0, dtype=torch.int64)


def _as_module(transform: Any) -> nn.Module:
    return transform if isinstance(transform, nn.Module) else _Transform(transform)


def _sum_over_processes(trainer: Trainer, pl_module: LightningModule) -> Any:
    """What `fit_temperatures` calls to add up its sums; None in a single process."""
    if trainer.world_size == 1:
        return None

    def reduce(sums: Tensor) -> Tensor:
        total = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()

    return reduce


def _plain(fit: TemperatureFit) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(fit).items()}


def _unplain(state: dict[str, Any]) -> TemperatureFit:
    return TemperatureFit(
        **{k: Temperatures(*v) if isinstance(v, list) else v for k, v in state.items()}
    )
