"""The clock, with a clock of our own: turns, warm-up and ratios are counted, not timed."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_duo.cost import Spread, Timing, environment, interleave, peak_memory, timing


class Clock:
    """Methods that take the seconds they are told, on a clock that only they move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, ""
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def method(self, name: str, *seconds: float) -> object:
        left = list(seconds)

        def call() -> None:
            self.log += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_turns_are_interleaved_and_begin_one_further(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    methods = {name: clock.method(name, 1.0) for name in "abc"}
    found = interleave(methods, repeats=4)
    assert clock.log == "aabbcc" + "abc" + "bca" + "cab" + "abc"  # two calls each come before
    assert {name: list(values) for name, values in found.seconds.items()} == dict.fromkeys(
        "abc", [1.0] * 4
    )


def test_what_the_first_calls_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = interleave({"a": clock.method("a", 60.0, 3.0, 1.0)}, repeats=3)
    assert found.spread("a") == (1.0, 1.0, 1.0)


def test_short_methods_are_called_often_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = interleave({"a": clock.method("a", 1e-5)}, repeats=2)
    assert len(clock.log) == 2 + 2 * 200
    assert found.spread("a").median == pytest.approx(1e-5)


def test_a_budget_leaves_turns_out_but_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    methods = {"a": clock.method("a", 1.0), "b": clock.method("b", 3.0)}
    assert len(interleave(methods, repeats=10, budget=20).seconds["a"]) == 5
    assert len(interleave(methods, repeats=10, budget=1).seconds["a"]) == 3
    assert len(interleave(methods, repeats=10, budget=1000).seconds["a"]) == 10


def test_latency_waits_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", clock.method("|", 0.0))
    methods = {"a": clock.method("a", 1e-3)}
    interleave(methods, repeats=1, device="cuda")
    assert clock.log.endswith("|aa|")
    interleave(methods, repeats=1, device="cuda", overlap=False)
    assert clock.log.endswith("|a|a||")


@given(
    st.lists(
        st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)),
        min_size=1,
        max_size=9,
    ),
    st.floats(0.5, 2),
)
def test_ratios_are_those_of_the_turns(turns: list[tuple[float, float, float]], k: float) -> None:
    a, b, c = (list(values) for values in zip(*turns, strict=True))
    found = Timing({"a": a, "b": b, "c": c}).ratio("a", "b", "c")
    assert found.median == pytest.approx(statistics.median(x / (y + z) for x, y, z in turns))
    assert found.low <= found.median <= found.high
    slower = Timing({"a": [k * x for x in a], "b": [k * x for x in b]}).ratio("a", "b")
    assert slower.median == pytest.approx(Timing({"a": a, "b": b}).ratio("a", "b").median)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_quantiles(values: list[float]) -> None:
    want = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8]).double()
    )
    assert Spread.of(values) == pytest.approx(want.tolist(), abs=1e-6)


def test_a_row_says_against_what() -> None:
    row = Timing({"duo": [0.003], "base": [0.002], "sidekick": [0.001]}).row(
        "duo", "base", "sidekick"
    )
    assert (row["ms"], row["ratio"]) == (pytest.approx(3.0), pytest.approx(1.0))
    assert row["reference"] == "base + sidekick"
    assert row["readings"] == 1


@pytest.mark.skipif(peak_memory(lambda: None) is None, reason="this system does not say")
def test_memory_at_the_peak_is_seen_though_it_is_freed() -> None:
    size = 64 << 20

    def work() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first, second

    work()
    found = peak_memory(work)
    assert 1.9 * size < found < 2.5 * size
    assert peak_memory(lambda: None) < size / 8


def test_the_environment_says_what_figures_depend_on() -> None:
    found = environment()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["cores"] >= 1
    assert found["hardware"]
    assert all(isinstance(v, str | int) or v is None for v in found.values())
    assert not any(isinstance(v, float) and math.isnan(v) for v in found.values())
