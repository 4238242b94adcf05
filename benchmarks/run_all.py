"""Run every benchmark, each in its own process, and write a summary.

    python benchmarks/run_all.py --quick                            # `make bench`, minutes
    python benchmarks/run_all.py --results benchmarks/RESULTS.md    # the full profile
    python benchmarks/run_all.py --render --results benchmarks/RESULTS.md   # from files at hand

Rows, figures and summary.md go to outputs/bench (--output). --results also writes the report that
is kept in the repository, with its figures and rows beside it; no figure in it is typed by hand.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from harness import parser
from render import render, summarize

HERE = Path(__file__).parent
BENCHMARKS = {
    "throughput": "throughput.py",
    "head": "bench_head.py",
    "fit": "bench_fit.py",
    "cofinetune": "bench_cofinetune.py",
    "metrics": "bench_metrics.py",
}


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__)
    made.add_argument("--results", type=Path, help="the report to write, *.md")
    made.add_argument("--render", action="store_true", help="measure nothing")
    made.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    given = made.parse_args()
    passed = [] if not given.quick else ["--quick"]
    for option in ("device", "threads", "repeats", "output"):
        if getattr(given, option) is not None:
            passed += [f"--{option}", str(getattr(given, option))]
    failed = []
    for name in given.only if not given.render else ():
        started = time.perf_counter()
        more = ["--ranks", "1", "2", "4"] if name == "cofinetune" and not given.quick else []
        if name in ("head", "fit", "metrics") and given.threads is None:
            more = ["--threads", "1"]  # small work, which a second thread hardly helps
        command = [sys.executable, str(HERE / BENCHMARKS[name]), *passed, *more]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if subprocess.run(command, env=environment).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    summarize(given.output)
    print(f"Summary: {given.output / 'summary.md'}")
    if failed:
        unwritten = f"; {given.results} is as it was" if given.results else ""
        raise SystemExit(f"failed: {', '.join(failed)}; see above{unwritten}")
    if given.results:
        render(given.output, given.results)


if __name__ == "__main__":
    main()
