"""The summary table and the risk-coverage figure."""

from pathlib import Path

import torch
from helpers import make_logits
from PIL import Image
from rich.console import Console

from lightning_duo import fit_temperatures
from lightning_duo.evaluation import DuoMetrics
from lightning_duo.summary import summary_table


def test_the_table_fits_80_columns_and_marks_the_best() -> None:
    base, sidekick, targets = make_logits(200, 5, seed=0)
    fit = fit_temperatures(base, sidekick, targets)
    metrics = DuoMetrics(5, fit)
    metrics.update(base, sidekick, targets)
    table = summary_table(metrics.compute(), fit, data="some data", balance=None)
    console = Console(width=80, record=True, force_terminal=True)
    console.print(table)
    text = console.export_text(clear=False)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "unknown" in text
    assert f"{metrics.compute()['duo']['nll']:.3f}" in text
    best = min(row["nll"] for row in metrics.compute().values())
    assert f"1m{best:.3f}" in console.export_text(styles=True)


def test_the_figure_is_an_image(tmp_path: Path) -> None:
    curves = {name: (torch.rand(50), torch.rand(50) < 0.8) for name in ("base", "duo")}
    save_risk_coverage_figure(tmp_path / "new" / "figure.png", curves, title="Test")
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert image.size[0] > 400
        assert len(image.convert("L").getcolors()) > 20
