"""One step of the base: what goes in, and which logits it makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_duo.base import Call, logits_in
from lightning_duo.callback.explain import learn, with_targets
from lightning_duo.callback.guess import Guess, plain_logits
from lightning_duo.callback.loss_calls import Kind
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.reading import Example, Reading, Taken
from lightning_duo.callback.refusals import REMEDY, SUPPORTED, is_constant
from lightning_duo.callback.rehearsal import has_compiled, is_compiled, rehearse
from lightning_duo.callback.snapshot import Snapshot
from lightning_duo.callback.watch import Called, Watch
from lightning_duo.isolation import evaluating, unnoticed
from lightning_duo.nested import Path, at
from lightning_duo.tasks import task_of

Stage: TypeAlias = Literal["training", "validation", "test"]
LOOKS = 2  # steps of a kind that are watched before what was learnt is relied on


@dataclass
class Learnt:
    """What is known of the steps of one stage; it grows with them."""

    reading: Reading | None = None
    looks: int = 0
    """Steps in a row that were watched and did the same."""
    constant: int = 0
    """Steps in a row whose targets were one number that the step made."""
    leaks: bool | None = None
    """Whether the logits depend on the labels that the call was given; None: not known yet."""
    kind: Kind | None = None
    """Of the loss."""
    reruns: bool = False
    """Whether the base's logits are not seen in the step, which does not call it so or is compiled:
    it has to run once more for them, and training does without them."""
    targets_at: Path | None = None
    """Where in the batch the targets are, for a user who tells the logits only."""


class Step:
    """A batch from the start of the base's step to its end.

    Args:
        trainer: The user's.
        module: The base.
        batch: As its step is about to get it.
        options: The user's.
        messages: Where to say what was taken for what.
        stage: Which step.
        learnt: What is known of such steps; this one adds to it.
        known: What is known of steps of another stage, for those without a loss.
        fresh: Whether to look anew, as at the first batch of an epoch.

    Raises:
        ValueError: If the user's ``batch_fn`` finds no inputs and targets in the batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        options: Options,
        messages: Messages,
        *,
        stage: Stage,
        learnt: Learnt,
        known: Reading | None = None,
        fresh: bool = False,
    ) -> None:
        self.trainer, self.module, self.options, self.messages = trainer, module, options, messages
        self.stage, self.learnt, self.known, self.fresh = stage, learnt, known, fresh
        self.several, self.sanity = trainer.world_size > 1, trainer.sanity_checking
        told = options.batch_fn is not None or options.logits_fn is not None
        self.taken = Taken(batch)
        self.guess = Guess(module, batch, options, messages, first=fresh) if told else None
        if self.guess is not None and learnt.targets_at is not None:
            self.guess.targets = at(self.taken.batch, learnt.targets_at)
        reading = learnt.reading
        self.looking = fresh or reading is None or learnt.looks < LOOKS
        self.looking |= reading is not None and reading.watching
        names = None if self.looking or reading is None else frozenset({reading.module})
        self._hidden = is_compiled(module, stage)
        self._called: list[Called] | None = None  # before a rehearsal showed more
        mine = batch if self.guess is None else (self.guess.inputs, self.guess.targets)
        self._before = Snapshot(mine, copy=fresh)
        names = frozenset() if self._hidden else names
        self._watch = Watch(module, names=names, losses=self.looking and not self._hidden)
        self._watch.follow(trainer, stage)

    def finish(self) -> None:
        """Look no longer; may be called again."""
        self._watch.finish()

    def examples(self, outputs: Any, *, classes: int | None = None) -> list[Example]:
        """What the step made of its batch.

        Args:
            outputs: What the step returned.
            classes: How many outputs a head has, if it is known.

        Returns:
            The calls that made logits; none where a training step computed no loss, or did
            something else than those before it, of which a message tells.

        Raises:
            ValueError: If the step is no classification, cannot be followed, or changed its batch
                in place.
        """
        if self.guess is not None:
            found = self._told(self.guess, outputs, classes)
        elif self.looking:
            found = self._look(outputs)
        elif self.learnt.reading is not None and self.learnt.reading.guessed:
            found = self._without_loss(outputs, None)
        elif self.learnt.reruns and self.stage == "training":
            found = self._unseen(classes)
        elif self.learnt.reruns:
            found = self._without_loss(outputs, self.learnt.reading)
        else:
            found = self._replay()
        self._before.check(self.module, found)
        if self.stage != "training":
            found = self._without_labels(found)
        return found

    # ---- what the step itself tells ----

    def _look(self, outputs: Any) -> list[Example]:
        known = self.learnt.reading
        if known is None or known.guessed:
            known = self.known
        none = not self._watch.seen.losses and known is None
        if self._hidden or (none and has_compiled()):
            self._rehearse()
        seen = self._watch.seen
        if not seen.losses or (seen.by_hand and known is not None):
            return self._without_loss(outputs, known)
        try:
            reading, examples = self._learnt()
        except LookupError as error:
            if self.stage != "training" and (known is not None or seen.by_hand):
                return self._without_loss(outputs, known)
            raise ValueError(f"{error}; {REMEDY}") from error
        self._refuse_constant(reading, examples)
        self._remember(reading, examples)
        return examples

    def _learnt(self) -> tuple[Reading, list[Example]]:
        how: dict[str, Any] = {"head": self.options.head, "training": self.stage == "training"}
        try:
            return learn(self._watch.seen, self.taken, self.module, **how)
        except LookupError:
            if self._called is not None or not has_compiled():
                raise
        self._rehearse()  # a function that the step calls may be compiled
        return learn(self._watch.seen, self.taken, self.module, **how)

    def _rehearse(self) -> None:
        """See what is compiled in one more evaluation of the step."""
        numbers = self._watch.given[1:]
        found = rehearse(self.trainer, self.module, self.stage, self.taken.batch, numbers)
        self._called = self._watch.seen.calls
        self._watch.seen, self.taken = found

    def _remember(self, reading: Reading, examples: list[Example]) -> None:
        learnt = self.learnt
        same = learnt.reading is not None and learnt.reading.same_for == reading.same_for
        learnt.looks = learnt.looks + 1 if same else 1
        learnt.reading = reading
        if self._called is not None:
            mine = [called for called in self._called if called.name == reading.module]
            learnt.reruns = len(mine) != reading.calls
            if learnt.reruns and not self._is_in_batch(reading, examples[0]):
                learnt.looks = 0  # every step is rehearsed
        said = reading.text(examples[0].call)
        self.messages.info(said, once=said)
        if reading.watching and self.messages.first("watched"):
            self.messages.info(
                "the step computes its logits or targets itself, so every step is watched, which "
                "takes about a millisecond each"
            )

    def _is_in_batch(self, reading: Reading, example: Example) -> bool:
        """Whether the batch tells what is to be learnt from a step of which nothing is seen."""
        if reading.template is None or reading.calls != 1 or reading.watching:
            return False
        if self.stage != "training":
            return True
        assert example.logits is not None
        outputs = reading.task.outputs(example.logits)
        return reading.blank(self.taken.batch, outputs).shape == example.logits.shape

    def _unseen(self, classes: int | None) -> list[Example]:
        """The example of a training step that is compiled, whose logits nobody needs."""
        reading, batch = self.learnt.reading, self.taken.batch
        assert reading is not None
        logits = reading.blank(batch, classes or 0)
        targets = reading.pieces[0].read(batch, logits, reading.task)
        return [Example(reading.call_of(batch), logits, targets)]

    def _refuse_constant(self, reading: Reading, examples: list[Example]) -> None:
        """Refuse targets that the step makes, all alike, in one step after the other."""
        made = all(piece.targets is None for piece in reading.pieces)
        alike = made and all(is_constant(example.targets) for example in examples)
        self.learnt.constant = self.learnt.constant + 1 if alike else 0
        if self.learnt.constant >= LOOKS:
            raise ValueError(
                "the targets of every step are one constant that it makes itself (a contrastive "
                f"loss, or a discriminator?); {SUPPORTED}; {REMEDY}"
            )

    def _replay(self) -> list[Example]:
        reading = self.learnt.reading
        assert reading is not None
        try:
            return reading.read(self._watch.seen.calls, self.taken.batch)
        except LookupError as error:
            self.learnt.looks = 0
            if self.stage == "training" and not self.several:
                self.messages.warn(
                    f"a training step did something else than those before it ({error}), so the "
                    "sidekick leaves its batch out; the next steps are watched again",
                    once="another step",
                )
                return []
            raise ValueError(
                f"a {self.stage} step did something else than those before it: {error}; {REMEDY}"
            ) from error

    # ---- steps without a loss ----

    def _without_loss(self, outputs: Any, known: Reading | None) -> list[Example]:
        calls, batch = self._watch.seen.calls, self.taken.batch
        if not calls and self._may_skip(outputs, known):
            return []
        if known is not None:
            returned = self._returned(outputs, known)
            if returned is not None:
                return returned
            if known.whole:
                raise ValueError(
                    f"the {self.stage} step computes no loss and returns no logits, and only the "
                    f"step makes them, from what {known.name} gives; {REMEDY}"
                )
            try:
                reading = with_targets(known, calls, self.taken)
                examples = reading.read(calls, batch)
            except LookupError:
                reading, examples = self._elsewhere(known)
            self._remember(reading, examples)
            return examples
        if self.stage == "training":
            if outputs is None:
                return []  # it may have skipped its batch
            if plain_logits(outputs) is None or isinstance(outputs, Tensor):
                raise ValueError(
                    f"no loss of a classification was seen in the training step; {SUPPORTED}; "
                    f"{REMEDY}"
                )
        if self.sanity:
            return []  # the training step will tell
        guess = Guess(self.module, batch, self.options, self.messages, first=self.fresh)
        return self._guessed(guess, outputs, None)

    def _may_skip(self, outputs: Any, known: Reading | None) -> bool:
        """Whether a step that calls no module has left out its batch: one without objects, say."""
        nothing = outputs is None or (isinstance(outputs, Mapping) and not outputs)
        lost = known is not None and known.template is None  # one more forward is not possible
        return nothing and (self.stage == "training" or lost)

    def _returned(self, outputs: Any, known: Reading) -> list[Example] | None:
        """Logits that a step without a loss returns by that name, or makes itself."""
        logits = plain_logits(outputs)
        if logits is None or (isinstance(outputs, Tensor) and not known.whole):
            return None
        try:
            call = known.call_of(self.taken.batch)
            targets = known.pieces[0].read(self.taken.batch, logits, known.task)
        except LookupError:
            return None
        self.learnt.reading = known
        if not known.whole and self.messages.first("logits compared"):
            own = [c.output for c in self._watch.seen.calls if c.name == known.module]
            found = [logits_in(output, known.logits_at) for output in own]
            if not any(_close(one, logits) for one in found):
                self.messages.warn(
                    f"the {self.stage} step returns other logits {tuple(logits.shape)} than "
                    f"{known.name}, which the duo will call, gives for the same inputs; what it "
                    "returns is taken for the base's logits. Pass DuoCallback(..., "
                    "logits_fn=lambda module, inputs: ...) that gives the logits which are meant"
                )
        return [Example(call, logits.detach(), targets)]

    def _elsewhere(self, known: Reading) -> tuple[Reading, list[Example]]:
        """Logits of another module, such as an average, or of one more forward."""
        for called in reversed(self._watch.seen.calls):
            if called.name == known.module or self.taken.parts_of(called.call) is None:
                continue
            first = replace(known.pieces[0], number=0)
            reading = replace(known, module=called.name, pieces=(first,), calls=1)
            try:
                return reading, reading.read([called], self.taken.batch)
            except (LookupError, ValueError):
                continue
        try:
            call = known.call_of(self.taken.batch)
            logits = self._logits_of(known, call)
            targets = known.pieces[0].read(self.taken.batch, logits, known.task)
        except LookupError as error:
            raise ValueError(
                f"the {self.stage} step computes no loss and does not call {known.name} as the "
                f"training step does ({error}), so its logits are not known; {REMEDY}"
            ) from error
        self.messages.info(
            f"the {self.stage} step does not call {known.name}, or is compiled, so it runs once "
            "more per batch for its logits",
            once="extra forward",
        )
        self.learnt.reruns = True
        return known, [Example(call, logits, targets)]

    def _logits_of(self, reading: Reading, call: Call) -> Tensor:
        """What the module that a reading names gives for a call, in eval mode."""
        part = reading.part_of(self.module)
        with evaluating(self.module), unnoticed(self.module):
            logits = logits_in(call.of(part), reading.logits_at)
        if logits is None:
            raise LookupError(f"{reading.name} returns no logits without the labels")
        return logits.detach()

    def _without_labels(self, examples: list[Example]) -> list[Example]:
        """The same with logits that do not know the labels, if those of the step do."""
        reading, learnt = self.learnt.reading, self.learnt
        if reading is None or not reading.labels or reading.whole or learnt.leaks is False:
            return examples
        try:
            again = [e._replace(logits=self._logits_of(reading, e.call)) for e in examples]
        except Exception as error:  # whatever the user's model may raise
            raise ValueError(
                f"{reading.name} is called with the labels and cannot run without them "
                f"({type(error).__name__}: {error}), as a deployed duo will have to; give them a "
                "default of None in its forward, or pass DuoCallback(..., "
                "logits_fn=lambda module, inputs: ...)"
            ) from error
        if learnt.leaks is None:
            pairs = zip(again, examples, strict=True)
            learnt.leaks = not all(_close(a.logits, e.logits) for a, e in pairs)
            if learnt.leaks:
                self.messages.warn(
                    f"the logits of {reading.name} depend on the labels that it is called with (a "
                    "margin?); the duo uses those without labels, which takes one more forward per "
                    f"{self.stage} batch",
                    once="leaks",
                )
        return again if learnt.leaks else examples

    # ---- what the user tells ----

    def _told(self, guess: Guess, outputs: Any, classes: int | None) -> list[Example]:
        if self.looking:
            losses = self._watch.seen.losses
            kinds = [loss.kind for loss in losses if not self._watch.seen.by_hand]
            self.learnt.kind = next(iter(kinds), self.learnt.kind)
            if self.options.batch_fn is None:
                self._learn_targets(guess)
        return self._guessed(guess, outputs, classes)

    def _learn_targets(self, guess: Guess) -> None:
        """Take the targets that the loss was given where they are known to the eye."""
        try:
            reading, examples = self._learnt()
        except (LookupError, ValueError, IndexError):
            return
        if len(examples) == 1 and reading.pieces[0].targets is not None:
            self.learnt.targets_at = reading.pieces[0].targets
            guess.targets = at(self.taken.batch, reading.pieces[0].targets)

    def _guessed(self, guess: Guess, outputs: Any, classes: int | None) -> list[Example]:
        if self.stage == "training" and classes and self.learnt.reading is not None:
            logits = None  # nothing more is to be known of them
            task = self.learnt.reading.task
        else:
            logits = guess.logits(outputs, self._watch.seen.calls, classes=classes or 0)
            task = self.options.task or task_of(
                logits, guess.targets, labels=self.learnt.kind in ("labels", "probabilities")
            )
        self.learnt.reading = Reading("", (), task, (), template=(), guessed=True)
        self.learnt.looks += 1
        return [Example(guess.call, logits, guess.targets, ())]


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
