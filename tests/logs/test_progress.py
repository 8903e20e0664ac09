"""Plain lines for a log file, and a bar for a terminal."""

import io

from rich.console import Console

from flacuna_jax.logs.metrics import TrainRecord
from flacuna_jax.logs.progress import Eta, open_progress


def record(step, **values):
    return TrainRecord(
        step=step,
        epoch=0,
        loss=2.34567,
        mean_loss=2.4,
        grad_norm=1.25,
        learning_rate=2e-5,
        examples=128,
        rows=12,
        tokens=1000,
        supervised_tokens=400,
        fill=0.9876,
        **values,
    )


def test_one_plain_line_per_logged_step():
    file = io.StringIO()
    with open_progress(200, file=file) as progress:
        progress.say("12 rows")
        progress.advance(1)
        progress.show(record(1))
        progress.show(record(10, supervised_tokens_per_second=12345.6, peak_memory_bytes=3 * 2**30))
    first, second, third = file.getvalue().splitlines()
    assert first == "12 rows"
    assert second == "step   1/200  loss 2.3457 (mean 2.4000)  lr 2.00e-05  grad norm 1.250  fill 98.8 %  ETA -:--:--"
    assert "12,346 supervised tok/s  fill 98.8 %  memory 3.0 GiB  ETA 0:00:0" in third


def test_time_left_follows_the_pace_since_the_first_logged_step():
    now = [100.0]
    eta = Eta(1000, clock=lambda: now[0])
    assert eta.after(1) == "-:--:--"
    now[0] += 50
    assert eta.after(101) == "0:07:30"  # 0.5 s a step, 899 left
    assert Eta(5).after(5) == "0:00:00"


def test_a_terminal_gets_a_bar_with_the_figures(monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100)
    monkeypatch.setattr("flacuna_jax.logs.progress.Console", lambda **_: terminal)
    with open_progress(200, 50, file=file) as progress:
        with progress.doing("evaluating"):
            progress.say("before the first step")
        assert "evaluating" in file.getvalue()
        with progress.doing("saving"):
            pass
        assert "compiling" in file.getvalue(), "the label before the first step"
        assert "training" not in file.getvalue()
        progress.advance(51)
        progress.show(record(60))
        progress.say("saved step 60")
    shown = file.getvalue()
    assert "training" in shown
    assert "60/200" in shown
    assert "loss 2.3457" in shown
    assert "saved step 60" in shown


def test_other_hosts_print_nothing(capsys):
    with open_progress(200, primary=False) as progress:
        progress.advance(1)
        progress.show(record(1))
        progress.say("text")
    assert capsys.readouterr().out == ""
