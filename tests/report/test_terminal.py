"""The table for the terminal."""

import torch
from helpers import make_logits
from rich.console import Console

from lightning_duo.calibration import calibrate
from lightning_duo.evaluation import Form, evaluate, mean_probability, measure
from lightning_duo.report import summary_table
from lightning_duo.report.terminal import gain_sentence, threshold_sentence
from lightning_duo.selective.threshold import as_text

LOGITS = make_logits(200, 5, seed=0)


def test_the_table_fits_80_columns_and_marks_the_best() -> None:
    found = calibrate(*LOGITS)
    results = {form: measure(p) for form, p in evaluate(*LOGITS, found.fit).items()}
    console = Console(width=80, record=True, force_terminal=True)
    console.print(summary_table(results, found.fit, data="some data", balance=0.125))
    text = console.export_text(clear=False)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "12.5 %" in text
    assert f"{results['duo']['nll']:.3f}" in text
    best = min(row["nll"] for row in results.values())
    assert f"1m{best:.3f}" in console.export_text(styles=True)
    without = Console(width=80, record=True)
    without.print(summary_table(results, found.fit, data="some data", balance=None))
    assert "FLOPs" not in without.export_text()


def test_the_sentence_on_the_gain() -> None:
    found = calibrate(*LOGITS)
    results = {form: measure(p) for form, p in evaluate(*LOGITS, found.fit).items()}
    change = 100 * (results["duo"]["nll"] / results["base_scaled"]["nll"] - 1)
    assert change < -1
    sentence = gain_sentence(results, found.fit, 0.1)
    assert sentence.startswith(f"Duo against scaled base: NLL {change:+.1f} %, AURC ")
    assert "costs more" not in sentence
    assert gain_sentence(results, found.fit, 1.1).endswith("The sidekick costs more than the base.")
    useless = calibrate(LOGITS[0], torch.zeros_like(LOGITS[1]), LOGITS[2])
    assert "The sidekick adds nothing here" in gain_sentence(results, useless.fit, None)
    perfect = {form: {"nll": 0.0, "aurc": 0.0} for form in ("duo", "base_scaled")}
    assert "nothing left to gain" in gain_sentence(perfect, found.fit, None)


def test_further_forms_follow_the_seven() -> None:
    found = calibrate(*LOGITS)
    form = Form("two", {"base": 1, "sidekick": 1}, mean_probability)
    results = {
        name: measure(p)
        for name, p in evaluate(*LOGITS, found.fit, forms={"mean [of two]": form}).items()
    }
    names = ["mean [of two]", *(name for name in results if name != "mean [of two]")]
    console = Console(width=90, record=True)
    shuffled = {name: results[name] for name in names}
    console.print(summary_table(shuffled, found.fit, data="some data", balance=None))
    rows = [line.strip() for line in console.export_text().splitlines()]
    starts = ["base", "scaled base", "sidekick", "scaled sidekick", "unweighted", "UQ only", "duo"]
    first = next(i for i, row in enumerate(rows) if row.startswith("base"))
    for row, start in zip(rows[first:], [*starts, "mean [of two]"], strict=False):
        assert row.startswith(f"{start} ")
    assert f"{results['mean [of two]']['nll']:.3f}" in rows[first + 7]


def test_the_sentence_on_the_threshold() -> None:
    assert threshold_sentence(calibrate(*LOGITS)) == ""
    found = calibrate(*LOGITS, target_accuracy=0.9, delta=0.1)
    sentence = threshold_sentence(found)
    assert f"{as_text(found.threshold.value)}" in sentence
    assert f"{100 * found.threshold.coverage:.1f} % of the 200" in sentence
    assert "with probability 90 % on new data" in sentence
