"""Signals: recorded inside a run, raised outside of it; the same signal again ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flacuna_jax.run.stop import ECHO_SECONDS, SIGNALS, Stopped, StopRequest

pytestmark = pytest.mark.usefixtures("signals_of_a_terminal")


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_a_run_a_signal_raises_at_once(number):
    with pytest.raises(Stopped, match=number.name), StopRequest():
        send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_inside_a_run_a_signal_is_recorded_for_the_next_poll(number, capfd):
    with StopRequest() as stop, stop.deferred():
        assert not stop.poll()
        send(number)
        assert f"{number.name}: saving after the current step" in capfd.readouterr().err
        assert stop.received == number.name
        assert stop.poll()
        assert stop.poll()


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop, stop.deferred():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_ignored_by_nohup_or_a_script_stay_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stop.deferred():
            send(number)
            assert not stop.poll()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_another_signal_while_saving_does_not_end_the_process():
    """Slurm sends the signal of --signal, and SIGTERM at the time limit."""
    with StopRequest() as stop, stop.deferred():
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.received == "SIGUSR1"


def test_stopped_is_not_an_exception():
    assert not issubclass(Stopped, Exception)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_repeated_signal_within_a_moment_counts_once(number):
    """A launcher forwards the terminal's Ctrl-C; a shell that exits sends SIGHUP after its jobs received one."""
    with StopRequest() as stop, stop.deferred():
        echo = threading.Timer(ECHO_SECONDS / 3, os.kill, (os.getpid(), number))
        echo.start()
        send(number)
        echo.join()
        assert stop.poll()


def test_a_second_hangup_does_not_end_the_process():
    with StopRequest() as stop, stop.deferred():
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        assert stop.poll()


BUSY = """
import time
from flacuna_jax.run.stop import StopRequest
with StopRequest() as stop, stop.deferred():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if stop.poll():
            print("saving", flush=True)
            time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_twice_ends_the_process_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(number)
        assert process.wait(5) == -number
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
