"""What is around a run: the progress of long jobs."""

import io

import pytest

from support import launch


class Terminal(io.StringIO):
    def isatty(self):
        return True


def slow_job(monkeypatch, seconds, count):
    """The numbers below `count`, each of which takes `seconds` on a clock of the test's own."""
    clock = [0.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])

    def work(number):
        clock[0] += seconds
        return number

    return map(work, range(count))


def test_without_a_terminal_a_long_job_prints_a_line_each_minute(monkeypatch, capsys):
    job = launch.progress(slow_job(monkeypatch, 50, 6), 6, "packing", " shards")
    assert list(job) == [0, 1, 2, 3, 4, 5]
    # After 100, 200 and 300 seconds: the first time that 60 or more have gone by.
    assert capsys.readouterr().err.splitlines() == [
        "packing: 2 of 6 shards, 03:20 left",
        "packing: 4 of 6 shards, 01:40 left",
        "packing: 6 of 6 shards, 00:00 left",
    ]
    assert list(launch.progress(slow_job(monkeypatch, 1, 50), 50, "quick")) == list(range(50))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank, shown", [("0", True), ("1", False)])
def test_a_terminal_has_a_bar_on_the_first_process_alone(rank, shown, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("RANK", rank)
    assert len(list(launch.progress(slow_job(monkeypatch, 50, 6), 6, "packing", " shards"))) == 6
    assert ("packing" in terminal.getvalue()) == shown
    assert " left" not in terminal.getvalue()  # no lines beside the bar
