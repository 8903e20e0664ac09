"""Records, rates and trackers."""

import contextlib
import json
import math
import shutil
import struct
import sys
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flacuna_jax.config.run import LoggingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.logs.metrics import JsonLines, Rates, Throughput, TrainRecord, open_tracker, peak_memory_bytes


def record(step, **values):
    fields = {
        "epoch": 0,
        "loss": 1.0 / step,
        "mean_loss": 2.0 / step,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "examples": 128,
        "rows": 12,
        "tokens": 1000,
        "supervised_tokens": 400,
        "fill": 0.98,
    }
    return TrainRecord(step=step, **{**fields, **values})


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_steps(run_dir, steps, after_step=0, **logging):
    with open_tracker(LoggingConfig(**logging), run_dir, config={"seed": 42}, after_step=after_step) as tracker:
        for step in steps:
            tracker.log(record(step).to_json())
        tracker.sync()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rates_exclude_the_compiling_step_and_pauses():
    clock = Clock()
    throughput = Throughput(clock)
    throughput.add(1000, 400)
    clock.now += 60  # compilation
    assert throughput.lap() == Rates()
    throughput.start()
    assert throughput.lap() == Rates()
    for _ in range(4):
        throughput.add(1000, 400, flops=3e9)
        clock.now += 0.5
    with throughput.paused():
        clock.now += 30  # a checkpoint
    assert throughput.lap() == Rates(2000.0, 800.0, 0.5, 6e9)
    throughput.add(500, 100)
    clock.now += 2
    throughput.pause()
    clock.now += 3600  # between two calls of TrainingRun.train
    throughput.resume()
    assert throughput.lap() == Rates(250.0, 50.0, 2.0, 0.0)


def test_peak_memory_is_null_if_the_backend_has_no_statistics():
    assert peak_memory_bytes() is None


def test_a_record_has_the_documented_fields(tmp_path):
    log_steps(tmp_path, [1], tensorboard=False)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    documented = "step loss grad_norm learning_rate examples rows tokens supervised_tokens tokens_per_second fill"
    assert line.keys() >= set(documented.split())
    assert line["loss"] == 1.0
    assert line["tokens_per_second"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_jsonl_appends_and_is_strict_json(tmp_path):
    log_steps(tmp_path, [1, 2], tensorboard=False)
    with open_tracker(LoggingConfig(tensorboard=False), tmp_path, config={}, after_step=2) as tracker:
        tracker.log(record(3, loss=math.nan, grad_norm=math.inf).to_json())
        tracker.log({"kind": "evaluation", "step": 3, "eval/accuracy": 0.25})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[2]["loss"] is None
    assert lines[2]["grad_norm"] is None


def test_a_full_disk_is_one_message(small_disk):
    tracker = JsonLines(small_disk / "metrics.jsonl")
    tracker.log({"step": 1, "text": "x" * 500_000})
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        tracker.log({"step": 2, "text": "x" * 1_000_000})
    tracker.close()


def events(directory):
    """All events of a directory's files, in the order TensorBoard reads them."""
    found = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def visible_points(directory, tag):
    """The points that TensorBoard shows: a session start hides earlier events at its step or later."""
    points = []
    for event in events(directory):
        if event.session_log.status == SessionLog.START:
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


def test_a_resumed_run_shows_every_step_once_in_tensorboard(tmp_path):
    log_steps(tmp_path, [1, 2, 3, 4, 5, 6, 7])
    log_steps(tmp_path, [5, 6, 7, 8], after_step=4)  # within the same second: files must not collide
    assert visible_points(tmp_path / "tensorboard", "train/loss") == [
        (step, pytest.approx(1 / step)) for step in range(1, 9)
    ]
    log_steps(tmp_path, [1], after_step=0)
    assert visible_points(tmp_path / "tensorboard", "train/loss") == [(1, 1.0)]


def test_a_clock_set_back_hides_nothing_in_tensorboard(tmp_path, monkeypatch):
    log_steps(tmp_path, [1, 2, 3, 4])
    monkeypatch.setattr(time, "time", lambda: 1e9)
    log_steps(tmp_path, [3, 4, 5], after_step=2)
    assert [step for step, _ in visible_points(tmp_path / "tensorboard", "train/loss")] == [1, 2, 3, 4, 5]


def test_a_full_disk_disables_tensorboard_without_blocking(small_disk, tmp_path, capsys):
    (tmp_path / "tensorboard").symlink_to(small_disk)
    with open_tracker(LoggingConfig(), tmp_path, config={}, after_step=0) as tracker:
        tracker.log(record(1).to_json())
        with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 512)
        for step in range(2, 200):
            tracker.log(record(step).to_json())
        tracker.sync()
    assert capsys.readouterr().out.count("warning: TensorBoard is disabled from now on: [Errno 28]") == 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, 200))


def test_tensorboard_is_disabled_if_its_directory_is_invalid(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    log_steps(tmp_path, [1, 2])
    assert "warning: TensorBoard is disabled: " in capsys.readouterr().out
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_gets_scalars_only(tmp_path):
    with open_tracker(LoggingConfig(), tmp_path, config={}, after_step=0) as tracker:
        tracker.log({"kind": "plan", "rows": 7})
        tracker.log({"step": 3, "eval/accuracy": 0.25, "text": "x", "ok": True, "absent": None})
    tags = {value.tag for event in events(tmp_path / "tensorboard") for value in event.summary.value}
    assert tags == {"eval/accuracy"}


def test_other_hosts_log_nothing(tmp_path):
    with open_tracker(LoggingConfig(), tmp_path, config={}, after_step=0, primary=False) as tracker:
        tracker.log(record(1).to_json())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'flacuna-jax\[wandb\]'"):
        log_steps(tmp_path, [1], wandb="project")


def fake_wandb(monkeypatch):
    calls = types.SimpleNamespace(inits=[], logs=[], finished=0)

    class Run:
        def log(self, values, step):
            calls.logs.append((step, values))

        def finish(self):
            calls.finished += 1

    def init(**arguments):
        calls.inits.append(arguments)
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    module.Error = type("Error", (Exception,), {})
    module.teardown = lambda: None
    module.errors = types.SimpleNamespace(CommError=type("CommError", (module.Error,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls, module


def test_wandb_continues_one_run_over_restarts(tmp_path, monkeypatch):
    calls, _ = fake_wandb(monkeypatch)
    log_steps(tmp_path, [1, 2], wandb="project")
    log_steps(tmp_path, [2, 3], after_step=1, wandb="project")
    first, second = calls.inits
    assert first["id"] == second["id"]
    assert first["project"] == "project"
    assert first["config"] == {"seed": 42}
    assert [step for step, _ in calls.logs] == [1, 2, 2, 3]
    assert "step" not in calls.logs[0][1]
    assert calls.finished == 2


def test_wandb_that_cannot_start_is_one_message(tmp_path, monkeypatch):
    _, module = fake_wandb(monkeypatch)

    def init(**_):
        raise module.Error("no API key")

    module.init = init
    with pytest.raises(UserError, match="no API key; WANDB_MODE=offline"):
        log_steps(tmp_path, [1], wandb="project")


def test_wandb_without_a_network_logs_offline(tmp_path, monkeypatch, capsys):
    calls, module = fake_wandb(monkeypatch)
    connected = module.init

    def init(mode="online", **arguments):
        if mode == "online":
            raise module.errors.CommError("no route to host")
        return connected(mode=mode, **arguments)

    module.init = init
    log_steps(tmp_path, [1, 2], wandb="project")
    assert [step for step, _ in calls.logs] == [1, 2]
    assert calls.inits[0]["mode"] == "offline"
    assert "no route to host; logging offline" in capsys.readouterr().out


def test_a_failing_dashboard_is_disabled_and_the_run_continues(tmp_path, monkeypatch, capsys):
    calls, _ = fake_wandb(monkeypatch)

    def fail(self, *_, **__):
        raise ConnectionError("the network is gone")

    with open_tracker(LoggingConfig(wandb="project"), tmp_path, config={}, after_step=0) as tracker:
        tracker.log(record(1).to_json())
        wandb_run = next(t for t in tracker._trackers if type(t).__name__ == "WeightsAndBiases")._run
        monkeypatch.setattr(type(wandb_run), "log", fail)
        monkeypatch.setattr(type(wandb_run), "finish", fail)
        tracker.log(record(2).to_json())
        tracker.log(record(3).to_json())
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in calls.logs] == [1]
    said = capsys.readouterr().out
    assert said.count("WeightsAndBiases is disabled from now on: the network is gone") == 1


@pytest.mark.parametrize("how", ["file removed", "directory removed", "directory moved"])
def test_a_vanished_file_is_noticed_at_once(tmp_path, how):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with open_tracker(LoggingConfig(tensorboard=False), run_dir, config={}, after_step=0) as tracker:
        tracker.log(record(1).to_json())
        if how == "file removed":
            (run_dir / "metrics.jsonl").unlink()
        elif how == "directory removed":
            shutil.rmtree(run_dir)
        else:
            run_dir.rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="is gone: its directory was removed, moved or unmounted"):
            tracker.log(record(2).to_json())
        with pytest.raises(UserError, match="is gone"):
            tracker.sync()
