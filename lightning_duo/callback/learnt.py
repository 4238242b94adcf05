"""What is known of the steps of one stage, from the first that was seen on."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_duo.callback.by_hand import Kind
from lightning_duo.callback.reading import Reading
from lightning_duo.nested import Path

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
    by_hand: bool = False
    """Whether the step writes its losses out, or sums up their terms, in every step anew."""
    kind: Kind | None = None
    """Of the loss."""
    reruns: bool = False
    """Whether the base's logits are not seen in the step, which does not call it so or is compiled:
    it has to run once more for them, and training does without them."""
    targets_at: Path | None = None
    """Where in the batch the targets are, for a user who tells the logits only."""
