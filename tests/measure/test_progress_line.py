import contextlib
import io
import os
import pty
import re
import time

import pytest

from noctule.measure import Progress


def terminal():
    """A real terminal: a stream to write to, and a function that reads what it shows up to the end of the line."""
    shown, drawn = pty.openpty()
    stream = os.fdopen(drawn, "w")

    def read():
        text = ""
        while "\n" not in text:  # the terminal hands on what it got in pieces
            text += os.read(shown, 100_000).decode()
        return text

    return stream, read


def test_a_terminal_shows_one_line_redrawn():
    stream, read = terminal()
    start = time.monotonic()
    with stream, Progress(4, label="training", unit="steps", stream=stream) as progress:
        for _ in range(4):
            time.sleep(0.06)
            progress.advance(note="loss 0.25")
        progress.close()
        text = read()
    lines = text.rstrip("\r\n").split("\r")
    assert lines[0] == ""
    assert text.count("\n") == 1
    assert re.match(r"training [12]/4 steps  (25|50)%  [\d.]+ steps/s  \d:\d\d left  loss 0.25", lines[1])
    assert lines[-1].startswith("training 4/4 steps  100%")
    assert len(lines) <= 3 + (time.monotonic() - start) / 0.1, "drawn at most ten times a second, and at the end"


def test_a_shorter_line_covers_a_longer_one():
    stream, read = terminal()
    with stream:
        progress = Progress(stream=stream)
        time.sleep(0.11)
        progress.advance(note="a long note")
        progress.advance(note="")
        progress.close()
        progress.close()
        first, second = re.findall(r"\r([^\r\n]+)", read())
    assert len(second) >= len(first)
    assert re.search(r"/s  \d:\d\d$", second.rstrip())


def test_a_file_gets_a_line_every_so_often():
    stream = io.StringIO()
    start = time.monotonic()
    with Progress(10, label="reading", unit="MB", every_seconds=0.1, stream=stream) as progress:
        for _ in range(10):
            time.sleep(0.03)
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 2 + (time.monotonic() - start) / 0.1
    assert all("\r" not in line for line in lines)
    assert lines[-1].startswith("reading 10/10 MB  100%")


def test_short_work_is_silent_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(3, stream=stream) as progress:
        progress.advance(3)
    assert stream.getvalue() == ""


def test_rates_leave_out_what_was_done_before():
    progress = Progress(1000, start=900, stream=io.StringIO())
    time.sleep(0.05)
    progress.advance(10)
    rate = float(re.search(r"([\d.]+)/s", progress.line())[1])
    assert 1 < rate <= 200
    assert progress.line().startswith("910/1,000")


@pytest.mark.parametrize(("total", "shown"), [(None, "5  "), (0, "5/0  "), (3, "5/3  167%")])
def test_totals_that_are_unknown_or_wrong_do_no_harm(total, shown):
    progress = Progress(total, stream=io.StringIO())
    progress.advance(5)
    assert progress.line().startswith(shown)
    assert "left" not in progress.line()


def test_a_reader_that_has_gone_does_not_end_the_work():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with Progress(2, every_seconds=0, stream=stream) as progress:
        progress.advance()
        progress.advance()
    assert progress.done == 2
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_an_exception_passes_through():
    with pytest.raises(KeyError), Progress(2, stream=io.StringIO()):
        raise KeyError
