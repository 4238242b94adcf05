"""`lightning-duo sidekick` and `evaluate`: duos of your LightningModule and your data."""

import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_duo.cli.options import (
    built_in_run,
    called,
    check_numbers,
    check_outputs,
    is_function,
    model_maker,
    named,
)

if TYPE_CHECKING:
    from lightning_duo.callback import Saved

# Torch and Lightning are imported where they are used: --help should not wait for them.


def evaluate(
    checkpoint: str,
    *,
    model: str,
    data: str,
    report: str | None = None,
    sidekick: str | None = None,
    sidekick_transform: str | None = None,
    logits_fn: str | None = None,
    batch_fn: str | None = None,
    name: str | None = None,
    weights_only: bool = True,
    resamples: int | None = None,
) -> None:
    """Judge the duo of a run on its test data: a table here, and a report as one HTML file.

    Args:
        checkpoint: Checkpoint of a run with DuoCallback, *.ckpt. Its temperatures and threshold are
            used as they are; nothing is fitted.
        model: MODULE:NAME, the class of your LightningModule if it saves its hyperparameters, or a
            function of a Python file that gives the module when called without arguments
            (my_models:Classifier).
        data: MODULE:NAME, the class of your LightningDataModule, or a function that gives it, or a
            DataLoader, when called without arguments.
        report: HTML file to write with figures and intervals; it opens offline.
        sidekick: MODULE:NAME, if the sidekick was a module of your own: the function that made it,
            or one without arguments that gives it.
        sidekick_transform: MODULE:NAME, if the transform was of your own.
        logits_fn: MODULE:NAME, if the run had one.
        batch_fn: MODULE:NAME, if the run had one.
        name: Of the duo, if the run had several.
        weights_only: false reads a checkpoint with more than tensors and plain types, which may run
            code that it names.
        resamples: Resamples of the bootstrap that gives the intervals of the report; by default
            1000, above 50 000 samples fewer.
    """
    from lightning.pytorch import LightningDataModule, Trainer

    from lightning_duo.callback import DuoCallback, Saved
    from lightning_duo.report import print_summary

    check_numbers({"--resamples": (resamples, 2)})
    check_outputs({"--report": (report, ".html")})
    saved = Saved.read(checkpoint, name=name, weights_only=weights_only)
    given = {"sidekick": sidekick, "sidekick_transform": sidekick_transform}
    given |= {"logits_fn": logits_fn, "batch_fn": batch_fn}
    base, options = built_in_run(model, saved, given)
    saved.check_batch_fn(options["batch_fn"])
    module, _ = saved.base(base)
    callback = DuoCallback(**options)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    quiet["enable_model_summary"] = False
    trainer = Trainer(callbacks=[callback], **quiet)
    source = _data(data, saved)
    where = "datamodule" if isinstance(source, LightningDataModule) else "dataloaders"
    trusted: dict[str, Any] = {} if weights_only else {"weights_only": False}
    trainer.test(module, **{where: source}, ckpt_path=checkpoint, verbose=False, **trusted)
    calibration = callback.calibration
    if calibration is None or not callback.results:
        raise ValueError(f"{checkpoint} was saved before the first validation: no temperatures yet")
    for stage, results in callback.results.items():
        if stage.startswith("test"):  # of several dataloaders each has its own
            shown = f"the test data of {data}" + stage.removeprefix("test").replace("/", ", ")
            print_summary(results, calibration, data=shown, balance=callback.balance)
    if report is not None:
        print(f"wrote {callback.write_report(report, resamples=resamples)}")


def _data(spec: str, saved: "Saved") -> Any:
    """The data that MODULE:NAME gives; a class gets the hyperparameters that the run has saved."""
    from lightning.pytorch import LightningDataModule

    make = named("data", spec)
    known = LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY in saved.checkpoint
    if isinstance(make, type) and issubclass(make, LightningDataModule) and known:
        trusted: dict[str, Any] = {} if saved.weights_only else {"weights_only": False}
        try:
            return make.load_from_checkpoint(saved.path, **trusted)
        except Exception as error:  # whatever a user's class says of what another one had saved
            raise ValueError(
                f"--data {spec} cannot be made with the hyperparameters of the data that "
                f"{saved.path} holds ({type(error).__name__}: {error}); name a function without "
                "arguments that gives the data to judge on, such as my_project:test_data"
            ) from error
    found = called("data", spec)
    if not isinstance(found, LightningDataModule | Iterable):
        raise ValueError(
            f"--data {spec} must give a LightningDataModule or a DataLoader, got "
            f"{type(found).__name__}"
        )
    return found


def _cli() -> Any:
    """LightningCLI with the options of `DuoCallback`."""
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from lightning_duo.callback import DuoCallback, OptimizerFn, SchedulerFn

    class SidekickCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # Those of LightningCLI are the base's.
            apart = {"optimizer": OptimizerFn, "lr_scheduler": SchedulerFn}
            own = parser.add_method_arguments(
                DuoCallback, "__init__", as_group=False, skip={*apart}
            )
            for name, kind in apart.items():
                parser.add_argument(
                    f"--sidekick_{name}", type=kind | None, help="Of the sidekick; see DuoCallback."
                )
            parser.add_argument(
                "--ckpt_path", type=str | None, help="Checkpoint of the base, or of a run of this."
            )
            parser.add_argument(
                "--weights_only",
                type=bool | None,
                help="false reads a checkpoint that holds more than tensors and plain types.",
            )
            self.options = {name: name for name in [*own, "ckpt_path"]}
            self.options |= {name: f"sidekick_{name}" for name in apart}

    return SidekickCLI


def sidekick() -> None:
    """Train a sidekick for a trained base.

    Model, data and trainer are named as for LightningCLI, by options or by a --config file of it;
    the other options are those of DuoCallback.
    """
    from lightning_duo.callback import EPOCHS, add_sidekick

    classes, words = _classes(sys.argv[2:])
    sys.argv = [sys.argv[0], *words]
    cli = _cli()(
        **classes,
        run=False,
        # The base's own may be there too.
        save_config_kwargs={"config_filename": "sidekick.yaml", "overwrite": True},
        trainer_defaults={"max_epochs": EPOCHS},
        parser_kwargs={"prog": "lightning-duo sidekick", "description": sidekick.__doc__},
    )
    options = {name: cli.config_init[key] for name, key in cli.options.items()}
    options["weights_only"] = cli.config_init["weights_only"] is not False
    if isinstance(options["sidekick"], str) and is_function(options["sidekick"]):
        options["sidekick"] = model_maker("sidekick", options["sidekick"])
    if options["ckpt_path"] is None:
        warnings.warn(
            "there is no --ckpt_path, so the base has the weights that its constructor gives it; "
            "is it trained?",
            stacklevel=2,
        )
    add_sidekick(cli.model, cli.datamodule, trainer=cli.trainer, **options)
    saver: Any = cli.trainer.checkpoint_callback
    path = saver and (saver.best_model_path or saver.last_model_path)
    if path and cli.trainer.is_global_zero:
        print(f"wrote {path}")


def _classes(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The classes of module and data, and the words of the command line that are left.

    A configuration file of ``LightningCLI(MyModel, MyData)`` holds their arguments alone, so their
    classes are given to LightningCLI. A file of ``LightningCLI()`` names the classes itself.
    """
    import yaml

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("model", "data"):
        parser.add_argument(f"--{option}")
    parser.add_argument("-c", "--config", action="append", default=[])
    given, rest = parser.parse_known_args(words)
    files = [yaml.safe_load(Path(name).read_text(encoding="utf-8")) for name in given.config]
    classes = {}
    before = [word for name in given.config for word in ("--config", name)]
    for option, key in (("model", "model_class"), ("data", "datamodule_class")):
        spec = getattr(given, option)
        inside = [part for file in files if isinstance(part := (file or {}).get(option), dict)]
        if spec is None:
            if any("class_path" not in part for part in inside):
                raise ValueError(
                    f"--config holds arguments of the {option}, but not its class; pass --{option} "
                    "MODULE:NAME too, such as my_project:Classifier"
                )
        elif any("class_path" in part for part in inside):
            before += [f"--{option}", spec.replace(":", ".")]
        else:
            classes[key] = _maker(option, spec if ":" in spec else ":".join(spec.rsplit(".", 1)))
    return classes, [*before, *rest]


def _maker(option: str, spec: str) -> Any:
    """The class that MODULE:NAME names, or a function that says what it makes, for LightningCLI.

    A function that does not say it is called without arguments.
    """
    make = named(option, spec)
    if isinstance(make, type) or "return" in getattr(make, "__annotations__", {}):
        return make
    found = called(option, spec)

    def made() -> Any:
        return found

    made.__annotations__["return"] = type(found)
    return made
