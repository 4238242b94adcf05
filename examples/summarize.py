"""A Markdown table over several runs of demo.py: mean and standard deviation over seeds.

python examples/summarize.py outputs/demo/seed*/results.json
"""

import argparse
import json
import statistics
from pathlib import Path

from lightning_duo.evaluation import MEASURES
from lightning_duo.evaluation.forms import LABELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    runs = [json.loads(path.read_text()) for path in parser.parse_args().results]

    def spread(values: list[float], factor: float, decimals: int) -> str:
        scaled = [factor * value for value in values]
        deviation = f" ± {statistics.stdev(scaled):.{decimals}f}" if len(scaled) > 1 else ""
        return f"{statistics.mean(scaled):.{decimals}f}{deviation}"

    shown = {name: measure for name, measure in MEASURES.items() if measure.summary}
    headings = [measure.heading for measure in shown.values()]
    print("| |", " | ".join(headings), "|")
    print("|---|" + "---|" * len(headings))
    for form, name in LABELS.items():
        cells = [
            spread([run[form][metric] for run in runs], measure.factor, measure.digits)
            for metric, measure in shown.items()
        ]
        print(f"| {name} |", " | ".join(cells), "|")
    print()
    for metric in ("nll", "aurc"):
        changes = [run["duo"][metric] / run["base_scaled"][metric] - 1 for run in runs]
        each = ", ".join(f"{100 * change:+.1f} %" for change in changes)
        print(f"Duo against scaled base, {metric.upper()}, seed by seed: {each}.")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    balance = 100 * runs[0]["flops_balance"]
    seconds = spread([run["seconds"] for run in runs], 1, 0)
    print(f"Seeds {seeds}; FLOPs balance {balance:.1f} %; {seconds} s a run.")


if __name__ == "__main__":
    main()
