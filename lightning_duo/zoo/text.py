"""Text classifiers of transformers."""

from pathlib import Path

from torch import nn

from lightning_duo.zoo.heads import head_parameters
from lightning_duo.zoo.names import TRANSFORMERS


def text_model(
    name: str, num_classes: int, *, pretrained: bool, per_token: bool
) -> tuple[nn.Module, bool]:
    """Build a classifier of sequences or of tokens; also whether its head is a trained one.

    Args:
        name: Name on the Hugging Face hub, or a folder that ``save_pretrained`` wrote.
        num_classes: K.
        pretrained: Whether to take weights too; else only the configuration.
        per_token: Whether every token gets logits, (N, T, K), or the sequence, (N, K).

    Raises:
        RuntimeError: If its files cannot be had; it names what to do.
        ValueError: If transformers has no such classifier for that kind of model.
    """
    import transformers

    tokens, sequences = "AutoModelForTokenClassification", "AutoModelForSequenceClassification"
    make = getattr(transformers, tokens if per_token else sequences)
    # Without a problem type the model has no loss of its own choice.
    config = {"num_labels": num_classes, "problem_type": None}
    new: set[str] = set()
    try:
        if pretrained:
            model, found = make.from_pretrained(
                name, **config, ignore_mismatched_sizes=True, output_loading_info=True
            )
            # Names, or tuples that begin with one, by the version of transformers.
            resized = (key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
            new = {*found["missing_keys"], *resized}
        else:
            model = make.from_config(transformers.AutoConfig.from_pretrained(name, **config))
    except OSError as error:
        raise RuntimeError(_no_files(name, error)) from error
    # Weights may have been published in half precision, which is too coarse to train them in.
    classifier: nn.Module = model.float().train()
    head = {key for key, _ in head_parameters(classifier, num_classes)}
    return classifier, pretrained and not head & new


def _no_files(name: str, error: OSError) -> str:
    """Say what could not be had, and what to do."""
    what = f"could not get the sidekick '{TRANSFORMERS}{name}' ({str(error).splitlines()[0]})."
    if Path(name).is_dir():
        return (
            f"{what} Pass a folder with the weights that save_pretrained() wrote, or "
            "pretrained=False to train it from scratch, which needs config.json only"
        )
    return (
        f"{what} Without a network, pass '{TRANSFORMERS}<local folder>' with a folder that "
        "save_pretrained() wrote; with pretrained=False its config.json is enough, and the "
        "sidekick is trained from scratch"
    )
