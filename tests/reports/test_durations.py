"""What took how long, in one line."""

from __future__ import annotations

from starquant.reports.durations import in_time, took
from starquant.store.record import Timings

TIMINGS = Timings(
    seconds={"load": 1.0, "calibrate": 120.0, "evaluate": 11.0, "evaluate/gsm8k": 9.0, "evaluate/piqa": 1.5},
    peak_host_memory_gb=0.5,
    peak_device_memory_gb=None,
)


def test_parts_of_a_stage_count_once_and_what_was_not_done_is_not_shown() -> None:
    assert TIMINGS.total_s == 132.0
    line = "load 1.0 s, calibrate 2.0 min, evaluate 11.0 s (gsm8k 9.0 s, piqa 1.5 s)"
    assert took(TIMINGS) == f"2.2 min in all: {line}"
    beside = {"export": 48.0, "fidelity": 0.01, "full precision": None}
    assert took(TIMINGS, beside) == f"3.0 min in all: {line}, export 48.0 s"


def test_seconds_are_in_the_unit_that_a_reader_wants() -> None:
    assert [in_time(s) for s in (0.04, 89, 120, 7200)] == ["0.0 s", "89.0 s", "2.0 min", "2.0 h"]
