"""One step of the base: what goes in, and which logits it makes of it."""

from contextlib import suppress
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_duo.callback.explain import learn
from lightning_duo.callback.guess import Guess, plain_logits
from lightning_duo.callback.heads import AnotherHead
from lightning_duo.callback.learnt import LOOKS, Learnt, Stage
from lightning_duo.callback.loss_calls import LossMode
from lightning_duo.callback.lossless import Lossless, may_skip
from lightning_duo.callback.messages import Messages
from lightning_duo.callback.options import Options
from lightning_duo.callback.reading import Example, Reading
from lightning_duo.callback.refusals import REMEDY, SUPPORTED, is_constant
from lightning_duo.callback.rehearsal import has_compiled, is_compiled, rehearse
from lightning_duo.callback.rerun import without_labels
from lightning_duo.callback.snapshot import Snapshot
from lightning_duo.callback.taken import Taken
from lightning_duo.callback.told import note_kind, read_told
from lightning_duo.callback.trained import step_of_user
from lightning_duo.callback.watch import Called, Watch
from lightning_duo.nested import at, leaves, path_text


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
        self._anew = fresh or reading is None or learnt.looks < LOOKS or learnt.by_hand
        self.looking = self._anew or (reading is not None and reading.watching)
        names = None if self._anew or reading is None else frozenset({reading.module})
        self._trained = stage == "training" and step_of_user(module) is not None
        self._hidden = self._trained or is_compiled(module, stage)
        self._called: list[Called] | None = None  # before a rehearsal showed more
        tensors = self.taken.tensors
        if self.guess is not None:  # its own may be no part of the batch
            tensors = [leaf for _, leaf in leaves((self.guess.inputs, self.guess.targets))]
        self._before = Snapshot(tensors, copy=fresh)
        names = frozenset() if self._hidden else names
        losses = self.looking and not self._hidden
        mode = partial(LossMode, follow=self._anew)
        self._watch = Watch(module, names=names, losses=losses, mode=mode)
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
            found = self._look(outputs, classes)
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
            given = found, self.module, self.learnt, self.messages, self.taken.batch
            found = without_labels(*given, stage=self.stage)
        return found

    # ---- what the step itself tells ----

    def _look(self, outputs: Any, classes: int | None) -> list[Example]:
        known = self.learnt.reading
        if known is None or known.guessed:
            known = self.known
        none = not self._watch.seen.losses and known is None
        if self._hidden or (none and has_compiled()):
            try:
                self._rehearse()
            except ValueError:
                if not self._trained or known is None or known.watching:
                    raise
                return self._as_elsewhere(known, classes)
        seen = self._watch.seen
        metrics = seen.by == "metrics" and self.stage != "training" and known is None
        read = known is not None and not known.watching  # without what the step makes by hand
        if not seen.losses or metrics or (seen.by == "hand" and read):
            return self._without_loss(outputs, known)
        try:
            reading, examples = self._learnt()
        except AnotherHead as error:
            return self._other_step(error)
        except LookupError as error:
            if not self._anew:
                self.learnt.looks = 0
                return self._other_step(error)
            if self.stage != "training" and (known is not None or seen.by == "hand"):
                return self._without_loss(outputs, known)
            raise ValueError(f"{error}; {REMEDY}") from error
        self._refuse_constant(reading, examples)
        self._remember(reading, examples)
        return examples

    def _as_elsewhere(self, known: Reading, classes: int | None) -> list[Example]:
        """The example of a step that cannot be seen, read as the steps of another stage are.

        Raises:
            ValueError: If its batch is another.
        """
        learnt = self.learnt
        learnt.reading, learnt.reruns, learnt.looks = known, True, LOOKS
        try:
            return self._unseen(classes)
        except LookupError as error:
            raise ValueError(f"the training step cannot be seen: {error}; {REMEDY}") from error

    def _learnt(self) -> tuple[Reading, list[Example]]:
        training = self.stage == "training"
        known = self.learnt.reading if training else self.known or self.learnt.reading
        if training and known is None and self.known is not None and self.known.heads == 1:
            known = self.known  # of several heads that which alone is validated
        how: dict[str, Any] = {
            "head": self.options.head,
            "training": training,
            "known": known,
            "other": self.known,
        }
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
        seen = self._watch.seen
        learnt.by_hand = reading.watching and (seen.by == "hand" or seen.terms)
        if self._called is not None:
            mine = [called for called in self._called if called.name == reading.module]
            learnt.reruns = len(mine) != reading.calls
            if learnt.reruns and not self._is_in_batch(reading, examples[0]):
                learnt.looks = 0  # every step is rehearsed
        said = reading.text(examples[0].call, self.taken)
        self.messages.info(said, once=said)
        if reading.others:
            texts = {f"batch{path_text(path, self.taken.batch)}" for path in reading.others}
            others = ", ".join(sorted(texts))
            self.messages.info(
                f"the step makes its logits of {others} too, which the sidekick, called as "
                f"{reading.name} is, does not see; to give it more, pass batch_fn=lambda batch: "
                "(inputs, targets) and logits_fn=lambda module, inputs: logits",
                once=others,
            )
        if reading.watching and self.messages.first("watched"):
            self.messages.info(
                "the step computes its logits or targets itself, so every step is watched, which "
                "takes about a millisecond each, or more where it writes its losses out"
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
            return self._other_step(error)

    def _other_step(self, error: LookupError) -> list[Example]:
        """Leave out a training step that did something else; refuse any other."""
        if self.stage == "training" and self.learnt.reading is not None and not self.several:
            self.messages.warn(
                f"a training step did something else than those before it ({error}), so the "
                "sidekick leaves its batch out; the next steps are watched again",
                once="another step",
            )
            return []
        raise ValueError(
            f"a {self.stage} step did something else than those before it: {error}; {REMEDY}"
        ) from error

    # ---- other steps ----

    def _without_loss(self, outputs: Any, known: Reading | None) -> list[Example]:
        calls = self._watch.seen.calls
        if not calls and may_skip(outputs, known, stage=self.stage):
            return []
        if known is not None:
            given = self.learnt, self.messages, self.stage, self.taken, calls
            step = Lossless(self.module, known, *given)
            returned = step.returned(outputs)
            if returned is not None:
                return returned
            reading, examples = step.called()
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
        first = self.fresh
        guess = Guess(self.module, self.taken.batch, self.options, self.messages, first=first)
        return self._read_told(guess, outputs, None)

    def _told(self, guess: Guess, outputs: Any, classes: int | None) -> list[Example]:
        if self.looking:
            compiled = self._hidden or (not self._watch.seen.losses and has_compiled())
            if compiled and self.learnt.kind is None and self.options.task is None:
                with suppress(ValueError):  # the logits and targets may tell the task
                    self._rehearse()
            note_kind(self._watch.seen, self.learnt)
            if self.options.batch_fn is None:
                self._learn_targets(guess)
        return self._read_told(guess, outputs, classes)

    def _learn_targets(self, guess: Guess) -> None:
        """Take the targets that the loss was given where they are known to the eye."""
        try:
            reading, examples = self._learnt()
        except (LookupError, ValueError, IndexError):
            return
        if len(examples) == 1 and reading.pieces[0].targets is not None:
            self.learnt.targets_at = reading.pieces[0].targets
            guess.targets = at(self.taken.batch, reading.pieces[0].targets)

    def _read_told(self, guess: Guess, outputs: Any, classes: int | None) -> list[Example]:
        given = guess, outputs, self._watch.seen.calls, self.options, self.learnt
        return read_told(*given, stage=self.stage, classes=classes)
