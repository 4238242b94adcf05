"""A duo from the checkpoint of a run, without its Trainer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import Self

from lightning_duo.base import Call, LogitsFn
from lightning_duo.batch import BatchFn
from lightning_duo.calibration import Calibration
from lightning_duo.callback.checkpoint import (
    check_version,
    fitted_of,
    learnt_of,
    load_weights,
    read_checkpoint,
)
from lightning_duo.callback.deploy import duo_of
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.run import Run, deployed_reading
from lightning_duo.callback.sidekick import Sidekick
from lightning_duo.module import DuoModule
from lightning_duo.plain import call_of, transform_of
from lightning_duo.saved import eager_name
from lightning_duo.tasks import task_from_state
from lightning_duo.zoo import SidekickSource, check_source

Base = LightningModule | type[LightningModule] | nn.Module


class Saved(NamedTuple):
    """What a checkpoint holds of a duo."""

    path: Path
    checkpoint: dict[str, Any]
    """All of it."""
    state: dict[str, Any]
    """What `DuoCallback` has kept."""
    name: str | None
    """Of the callback, where a run had several."""
    weights_only: bool
    """Whether it may hold tensors and plain types alone."""

    @classmethod
    def read(cls, path: str | Path, *, name: str | None = None, weights_only: bool = True) -> Self:
        """Find the duo in a checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read so, or holds no duo, or several, or none of that name.
        """
        checkpoint = read_checkpoint(path, weights_only=weights_only)
        states: dict[str, Any] = checkpoint.get("callbacks") or {}
        mine = {
            key: state
            for key, state in states.items()
            if isinstance(state, dict) and {"library", "sidekick"} <= state.keys()
        }
        if not mine:
            raise ValueError(
                f"{path} holds no duo: it was saved by a run without DuoCallback, or with "
                "ModelCheckpoint(save_weights_only=True); give the base a sidekick with "
                "lightning_duo.add_sidekick"
            )
        chosen = [key for key in mine if name is None or repr({"name": name}) in key]
        if len(chosen) != 1:
            raise ValueError(
                f"{path} holds the duos {', '.join(sorted(mine))}; pass name=... (--name) with the "
                f"name of the one that is meant, got {name!r}"
            )
        state = {"given": {}, **mine[chosen[0]]}
        check_version(state)
        if state["sidekick"] is None:
            raise ValueError(f"{path} was saved before the first batch, so it has no sidekick yet")
        return cls(Path(path), checkpoint, state, name, weights_only)

    def options(
        self,
        sidekick: SidekickSource | None,
        sidekick_transform: Callable[[Any], Any] | None = None,
        logits_fn: LogitsFn | None = None,
        batch_fn: BatchFn | None = None,
    ) -> dict[str, Any]:
        """Arguments with which `DuoCallback` is as it was in that run.

        Raises:
            ValueError: If one that only the user has is missing.
        """
        state, given = self.state, self.state["given"]
        if sidekick is None and not state.get("named", _is_name(state["name"])):
            raise ValueError(
                f"the sidekick of {self.path}, {state['name']}, is a module of your own; pass "
                "sidekick=... (--sidekick MODULE:NAME), a module like it or the function that "
                "made it"
            )
        if (logits_fn is not None) is not given.get("logits_fn", logits_fn is not None):
            had = "a logits_fn of your own; pass logits_fn=... (--logits_fn MODULE:NAME) with it"
            if logits_fn is not None:
                had = "no logits_fn; leave it out"
            raise ValueError(f"the run of {self.path} had {had}")
        known = state.get("calling", {}).get("transform")
        if sidekick_transform is None and state["transform"] is not None:
            if known is None:
                raise ValueError(
                    f"the sidekick of {self.path} saw its inputs through {state['transform']}; "
                    "pass sidekick_transform=... (--sidekick_transform MODULE:NAME) with it"
                )
            sidekick_transform = transform_of(known)
        chosen = state["calibration"] and Calibration.from_state_dict(state["calibration"])
        return {
            "sidekick": state["name"] if sidekick is None else sidekick,
            "num_classes": None if state["num_classes"] == 1 else state["num_classes"],
            "sidekick_transform": sidekick_transform,
            "logits_fn": logits_fn,
            "batch_fn": batch_fn,
            "head": given.get("head"),
            "task": given.get("task") and task_from_state(given["task"]),
            "target_accuracy": chosen and chosen.target_accuracy,
            "delta": chosen and chosen.delta,
            "name": self.name,
        }

    def check_batch_fn(self, given: BatchFn | None) -> None:
        """Raise ValueError if a run that is to read batches lacks its ``batch_fn``."""
        if given is None and self.state["given"].get("batch_fn"):
            raise ValueError(
                f"the run of {self.path} had a batch_fn of your own; pass batch_fn=... (--batch_fn "
                "MODULE:NAME) with it"
            )

    def example(self, samples: int = 2) -> Call | None:
        """A call that the base takes, for so many samples; None if none is known."""
        known = self.state.get("example")
        return None if known is None else call_of(known, samples)

    def base(self, given: Base) -> tuple[LightningModule, nn.Module | None]:
        """The base with its weights, and the part of it that stands for it, if only that is given.

        Raises:
            ValueError: If the weights are those of another module, or the class cannot be called.
        """
        kinds = given if isinstance(given, type) else type(given)
        if not issubclass(kinds, LightningModule if kinds is given else nn.Module):
            raise TypeError(
                "the base must be your LightningModule, its class, or a module like the part of it "
                f"that its steps call, got {given!r}"
            )
        if isinstance(given, type):
            return self._made(given), None
        weights: dict[str, Tensor] = self.checkpoint["state_dict"]
        if isinstance(given, LightningModule):
            given.on_load_checkpoint(self.checkpoint)
            self._load(given, weights, strict=given.strict_loading)
            return given, None
        reading = deployed_reading(learnt_of(self.state))
        if reading is not None and (reading.whole or self.state["given"].get("logits_fn")):
            raise ValueError(
                f"the logits of {self.path} are made by the step or a logits_fn, which no part of "
                "the base has; pass the LightningModule of that run, or its class"
            )
        inside = f"{reading.module}." if reading is not None and reading.module else ""
        part = {k.removeprefix(inside): v for k, v in weights.items() if k.startswith(inside)}
        self._load(given, part)
        return LightningModule(), given

    def _made(self, cls: type[LightningModule]) -> LightningModule:
        trusted: dict[str, Any] = {} if self.weights_only else {"weights_only": False}
        try:
            return cls.load_from_checkpoint(self.path, map_location="cpu", **trusted)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{cls.__name__} cannot be made from {self.path} ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:800]}); is it the class of that run? Its "
                "hyperparameters are in a checkpoint if its __init__ calls "
                "self.save_hyperparameters(); else make the module yourself, and pass it instead "
                "of its class (--model with a function that gives it)"
            ) from error

    def _load(self, module: nn.Module, weights: dict[str, Tensor], *, strict: bool = True) -> None:
        own = {eager_name(name): name for name in module.state_dict()}
        try:
            renamed = {own.get(eager_name(k), k): v for k, v in weights.items()}
            module.load_state_dict(renamed, strict=strict)
        except RuntimeError as error:
            raise ValueError(
                f"the base of {self.path} has other weights than this {type(module).__name__}; "
                "pass the LightningModule of that run, built as it was then, or a module like the "
                f"part of it that its steps call: {' '.join(str(error).split())[:800]}"
            ) from error


def duo_from_checkpoint(
    path: str | Path,
    base: Base,
    sidekick: SidekickSource | None = None,
    *,
    name: str | None = None,
    sidekick_transform: Callable[[Any], Any] | None = None,
    logits_fn: LogitsFn | None = None,
    weights_only: bool = True,
) -> DuoModule:
    """See `DuoModule.from_checkpoint`."""
    saved = Saved.read(path, name=name, weights_only=weights_only)
    options = Options(**saved.options(sidekick, sidekick_transform, logits_fn))
    return duo_of_saved(saved, base, options)


def duo_of_saved(saved: Saved, base: Base, options: Options) -> DuoModule:
    """The duo of a checkpoint.

    Args:
        saved: What it holds.
        base: As for `DuoModule.from_checkpoint`.
        options: Those of its run.

    Raises:
        ValueError: If no temperatures were fitted, or the models are others.
    """
    state = saved.state
    fitted = fitted_of(state)
    if fitted is None:
        raise ValueError(
            f"{saved.path} was saved before the first validation, so there are no temperatures; "
            "use a later checkpoint, or trainer.validate(model, data, ckpt_path=...) with the "
            "callback"
        )
    module, called = saved.base(base)
    if called is not None:  # it cannot be told whether all of the base is as it was
        fitted = replace(fitted, weights=(None, *fitted.weights[1:]))
    messages = Messages(options.name)
    if options.transform_name != state["transform"]:
        messages.warn(
            f"the sidekick of {saved.path} saw its inputs through "
            f"{state['transform'] or 'no transform of yours'}, and is now given "
            f"{options.transform_name}; leave sidekick_transform out, or pass the one of the run"
        )
    sidekick = Sidekick.build(
        options,
        state["num_classes"],
        called or module,
        messages,
        in_chans=state.get("in_chans", 3),
        per_token=state.get("per_token", False),
        restored=True,
    )
    load_weights(sidekick.model, state["sidekick"], (state["name"], options.sidekick_name))
    if "calling" in state:
        sidekick.restore(state["calling"])
    else:
        messages.warn(
            f"{saved.path} was saved by lightning_duo {state['library']}, which did not keep "
            "whether inputs are resized or normalised for the sidekick, arguments left out, or a "
            "logits_fn asked; if any was, take the duo from trainer.validate(model, data, "
            "ckpt_path=...) and callback.module"
        )
    _in_precision(saved.checkpoint["state_dict"], called or module)
    _in_precision(state["sidekick"], sidekick.model)
    run = Run(
        options,
        messages,
        module,
        sidekick=sidekick,
        fitted=fitted,
        learnt=learnt_of(state),
        global_step=saved.checkpoint["global_step"],
    )
    duo = duo_of(run, copy=False, called=called)
    return duo.requires_grad_(False)


def _in_precision(weights: dict[str, Tensor], model: nn.Module) -> None:
    """A model in the one floating-point type that saved weights have, if they have one."""
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())


def _is_name(name: str) -> bool:
    """Whether a zoo has a model of that name."""
    try:
        check_source(name, None)
    except ValueError:
        return False
    return True
