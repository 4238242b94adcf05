"""What collecting logits tells its user."""

import warnings


def say(text: str) -> None:
    """Log a line, as the Trainer does."""
    from lightning.pytorch.utilities import rank_zero_info  # the command line needs no Lightning

    rank_zero_info(f"collect_logits: {text}")


def warn(text: str) -> None:
    """Warn of what is probably a mistake."""
    warnings.warn(f"collect_logits: {text}", stacklevel=3)
