"""What was measured, to look at: page, figures, terminal."""

from lightning_duo.report.figures import (
    check_matplotlib,
    confidence_figure,
    log_figures,
    reliability_figure,
    risk_coverage_figure,
)
from lightning_duo.report.page import write_report
from lightning_duo.report.terminal import MEASURED, SEEN, print_summary, summary_table

__all__ = [
    "MEASURED",
    "SEEN",
    "check_matplotlib",
    "confidence_figure",
    "log_figures",
    "print_summary",
    "reliability_figure",
    "risk_coverage_figure",
    "summary_table",
    "write_report",
]
