"""Latency on a clock that only the measured calls move."""

from types import SimpleNamespace

import pytest

import fxcompress.engines.latency
from fxcompress.engines.latency import Latency, measure
from fxcompress.errors import InputError


class Clock:
    """Every call of ``takes(name, seconds)`` moves time by its seconds and is noted."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def takes(self, name, *seconds):
        durations = list(seconds)

        def call():
            self.log.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return call

    def sleep(self, seconds):
        self.log.append("-")
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    stand_in = SimpleNamespace(perf_counter=lambda: made.now, sleep=made.sleep)
    monkeypatch.setattr(fxcompress.engines.latency, "time", stand_in)
    return made


WARM_UP = 5


def test_candidates_take_turns_and_each_follows_each(clock):
    measure({name: clock.takes(name, 0.01) for name in "abc"}, rounds=30)
    rounds = "".join(clock.log).replace("-", "")[3 * WARM_UP :]
    assert all(set(rounds[start : start + 3]) == set("abc") for start in range(0, 90, 3))
    assert {rounds[place : place + 2] for place in range(89)} >= {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_each_sample_is_taken_after_a_rest(clock):
    measure({name: clock.takes(name, 0.01) for name in "ab"}, rounds=2)
    assert all(taken[0] == "-" for taken in zip(clock.log[-8::2], clock.log[-7::2], strict=True))


def test_median_and_spread(clock):
    found = measure({"a": clock.takes("a", *[0.01] * WARM_UP, 0.01, 0.02, 0.03, 0.04, 0.05)}, rounds=5)["a"]
    assert found.samples == pytest.approx((0.01, 0.02, 0.03, 0.04, 0.05))
    assert found.median == pytest.approx(0.03)
    assert found.spread == pytest.approx((0.04 - 0.02) / 0.03)


def test_speedup_compares_within_a_round_so_that_a_slowing_machine_does_not_count(clock):
    slowing = [0.01 * (index + 1) for index in range(6)]
    found = measure(
        {
            "fast": clock.takes("fast", *[0.01] * WARM_UP, *slowing),
            "slow": clock.takes("slow", *[0.03] * WARM_UP, *(3 * each for each in slowing)),
        },
        rounds=6,
    )
    assert found["fast"].speedup_over(found["slow"]) == pytest.approx(3)


def test_short_calls_are_repeated_until_a_sample_is_long_enough(clock):
    found = measure({"a": clock.takes("a", 0.002)}, rounds=2)["a"]
    assert found.calls == 3
    assert found.median == pytest.approx(0.002)
    assert clock.log.count("a") == WARM_UP + 2 * 3


def test_no_round_starts_after_the_budget_but_five_are_made(clock):
    calls = {"a": clock.takes("a", 1.0)}
    assert len(measure(calls, rounds=100, budget=2)["a"].samples) == 5
    assert len(measure(calls, rounds=100, budget=9)["a"].samples) == 9
    assert len(measure(calls, rounds=3, budget=2)["a"].samples) == 3


def test_progress(clock):
    seen = []
    measure({"a": clock.takes("a", 1.0)}, rounds=3, on_round=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_nothing_to_measure():
    with pytest.raises(InputError, match="0 calls"):
        measure({})
    with pytest.raises(InputError, match="0 rounds"):
        measure({"a": lambda: None}, rounds=0)


def test_one_sample_has_no_spread_and_text_is_short():
    assert Latency((0.0123,), 1).spread == 0
    assert str(Latency((0.01, 0.01, 0.01), 1)) == "10 ms ± 0%"
