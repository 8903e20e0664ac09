"""Checkpoints: the same bytes back on any layout, and never wrong bytes from a damaged directory."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from flacuna_jax.errors import UserError
from flacuna_jax.storage.checkpoint import Checkpointer, list_checkpoints, restore_adapters

SHAPES = {"layers/q_proj/lora_a": (2, 4, 16), "layers/q_proj/lora_b": (2, 16, 4), "norm/weight": (16,)}
OPTIMIZER = optax.adamw(1e-3)
META = {"cursor": {"epoch": 1, "step": 7}, "rows_per_step": 12, "config": {"seed": 42}}


def state_after(step: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(step), len(SHAPES))
    params = {
        path: jax.random.normal(key, shape, dtype) for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    _, opt_state = OPTIMIZER.update(params, OPTIMIZER.init(params), params)
    return params, opt_state


def abstract(tree, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def save_steps(run_dir, steps, keep=3, asynchronous=False):
    with Checkpointer(run_dir, keep=keep, asynchronous=asynchronous) as checkpointer:
        for step in steps:
            checkpointer.save(step, *state_after(step), {**META, "step": step})


def restore(run_dir, targets=None, check=lambda meta: None, keep=3):
    messages = []
    with Checkpointer(run_dir, keep=keep, asynchronous=False) as checkpointer:
        targets = targets or tuple(abstract(tree) for tree in state_after(0))
        restored = checkpointer.restore(*targets, check=check, notify=messages.append)
    return restored, messages


def assert_is_state_after(step, restored):
    assert restored.step == step
    expected, got = state_after(step), (restored.trainable, restored.opt_state)
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert want.dtype == have.dtype
        assert np.asarray(want).tobytes() == np.asarray(have).tobytes()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_restores_the_same_bytes_and_meta(tmp_path, asynchronous):
    save_steps(tmp_path, [10], asynchronous=asynchronous)
    restored, messages = restore(tmp_path)
    assert_is_state_after(10, restored)
    assert restored.meta == {**META, "step": 10}
    assert messages == []


def test_an_empty_directory_restores_nothing(tmp_path):
    restored, _ = restore(tmp_path)
    assert restored is None
    assert list_checkpoints(tmp_path / "elsewhere") == []


def test_one_device_to_four_and_back(tmp_path):
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    save_steps(tmp_path / "one", [5])

    def spread(leaf):
        spec = PartitionSpec(None, "fsdp") if leaf.ndim == 3 else PartitionSpec("fsdp" if leaf.ndim else None)
        spec = spec if leaf.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    targets = jax.tree.map(spread, state_after(0))
    restored, _ = restore(tmp_path / "one", targets)
    assert_is_state_after(5, restored)
    assert restored.trainable["layers/q_proj/lora_a"].sharding == targets[0]["layers/q_proj/lora_a"].sharding
    assert len(restored.trainable["norm/weight"].addressable_shards) == 4

    with Checkpointer(tmp_path / "four", keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(5, restored.trainable, restored.opt_state, META)
    back, _ = restore(tmp_path / "four")
    assert_is_state_after(5, back)
    read, _ = restore_adapters(tmp_path / "four")
    assert all(array.tobytes() == np.asarray(restored.trainable[path]).tobytes() for path, array in read.items())


def test_bfloat16_survives(tmp_path):
    params, opt_state = state_after(1, jnp.bfloat16)
    with Checkpointer(tmp_path, keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(1, params, opt_state, META)
    restored, _ = restore(tmp_path, (abstract(params), abstract(opt_state)))
    assert all(np.asarray(params[p]).tobytes() == np.asarray(restored.trainable[p]).tobytes() for p in params)
    assert restore_adapters(tmp_path)[0]["norm/weight"].dtype == jnp.bfloat16


def test_retention_sorts_steps_as_numbers(tmp_path):
    save_steps(tmp_path, [8, 9, 10, 100], keep=2)
    assert list_checkpoints(tmp_path) == [10, 100]
    restored, _ = restore(tmp_path)
    assert restored.step == 100


def test_the_best_are_kept_in_addition_to_the_last(tmp_path):
    """As in a run: the best are given at each save, and an earlier best may no longer be one."""
    with Checkpointer(tmp_path, keep=2, asynchronous=False) as checkpointer:
        for step, best in ((8, [8]), (9, [8]), (10, [8]), (11, [8, 10]), (100, [10]), (101, [10])):
            checkpointer.save(step, *state_after(step), META, best=best)
            kept = checkpointer.steps()
            assert set(best) <= set(kept)
            assert kept[-2:] == sorted({8, 9, 10, 11, 100, 101} & set(range(step + 1)))[-2:]
        assert kept == [10, 100, 101]
        params, _ = state_after(10)
        read = checkpointer.read_trainable(10, abstract(params))
        assert all(np.asarray(read[path]).tobytes() == np.asarray(params[path]).tobytes() for path in params)
        truncate(tmp_path / "checkpoints" / "10" / "meta" / "metadata", 3)
        with pytest.raises(UserError, match="checkpoints/10 is damaged"):
            checkpointer.read_trainable(10, abstract(params))


def test_opening_and_closing_deletes_nothing(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    restore(tmp_path, keep=1)
    assert list_checkpoints(tmp_path) == [1, 2, 3]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    save_steps(tmp_path, [4, 4])
    assert list_checkpoints(tmp_path) == [4]


def test_asynchronous_save_allows_donation(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    params = {"layers/q_proj/weight": jax.random.normal(jax.random.key(0), (512, 4096))}
    expected = np.array(params["layers/q_proj/weight"])
    with Checkpointer(tmp_path, keep=1, asynchronous=True) as checkpointer:
        checkpointer.save(1, params, {"count": jnp.int32(1)}, META)
        for _ in range(5):
            params = step(params)
        jax.block_until_ready(params)
    assert restore_adapters(tmp_path)[0]["layers/q_proj/weight"].tobytes() == expected.tobytes()


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    save_steps(tmp_path, [10])
    half = tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "10", half)
    assert list_checkpoints(tmp_path) == [10]
    restored, messages = restore(tmp_path)
    assert_is_state_after(10, restored)
    assert messages == []
    assert not half.exists()


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "emptied": lambda path, size: truncate(path, 0),
    "first byte only": lambda path, size: truncate(path, min(1, size)),
    "half": lambda path, size: truncate(path, size // 2),
    "last byte lost": lambda path, size: truncate(path, size - 1),
    "zeros": lambda path, size: path.write_bytes(bytes(size)),
    "flipped first": lambda path, size: flip(path, 0),
    "flipped middle": lambda path, size: flip(path, size // 2),
    "flipped last": lambda path, size: flip(path, size - 1),
    "deleted": lambda path, size: path.unlink(),
}


# An abandoned read of the library may report to its closed event loop later, which cannot be prevented.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("third", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_file_never_yields_wrong_values(tmp_path, third):
    """Every kind of damage to every file: either the newest is restored exactly, or the previous one with a message."""
    save_steps(tmp_path / "good", [10, 20])
    root = tmp_path / "good" / "checkpoints" / "20"
    files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
    noticed = set()
    for number, (name, damage) in enumerate(itertools.product(files, DAMAGES)):
        # In the quick set each file gets a third of the damages; over all files every damage occurs many times.
        if number % 3 != third:
            continue
        run_dir = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "good", run_dir)
        path = run_dir / "checkpoints" / "20" / name
        DAMAGES[damage](path, path.stat().st_size)
        restored, messages = restore(run_dir)
        assert_is_state_after(restored.step, restored)
        assert (restored.step == 10) == bool(messages)
        if restored.step == 10:
            noticed.add(str(name).split("/")[0])
            assert "checkpoints/20 is damaged" in messages[0]
            assert list_checkpoints(run_dir) == [10]
            assert (run_dir / "unreadable_checkpoints" / "20.0").is_dir()
        shutil.rmtree(run_dir)
    assert noticed >= {"trainable", "optimizer", "meta"}


def test_a_step_can_be_saved_again_after_its_damaged_checkpoint_was_set_aside(tmp_path):
    save_steps(tmp_path, [10, 20])
    shutil.rmtree(tmp_path / "checkpoints" / "20" / "trainable")
    for _ in range(2):
        with Checkpointer(tmp_path, keep=3, asynchronous=False) as checkpointer:
            targets = (abstract(tree) for tree in state_after(0))
            assert checkpointer.restore(*targets, check=lambda meta: None, notify=print).step == 10
            checkpointer.save(20, *state_after(20), META)
        restored, _ = restore(tmp_path)
        assert_is_state_after(20, restored)
        truncate(tmp_path / "checkpoints" / "20" / "meta" / "metadata", 3)
    assert {path.name for path in (tmp_path / "unreadable_checkpoints").iterdir()} == {"20.0", "20.1"}


def test_a_changed_value_in_meta_is_detected(tmp_path):
    save_steps(tmp_path, [10, 20])
    meta = tmp_path / "checkpoints" / "20" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"rows_per_step": 12', '"rows_per_step": 13'))
    restored, messages = restore(tmp_path)
    assert restored.step == 10
    assert "meta" in messages[0]


def test_no_intact_checkpoint_is_an_error_and_never_a_fresh_start(tmp_path):
    save_steps(tmp_path, [10, 20])
    for step in (10, 20):
        truncate(tmp_path / "checkpoints" / str(step) / "meta" / "metadata", 3)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        restore(tmp_path)
    assert list_checkpoints(tmp_path) == [10, 20]


def test_check_fails_before_any_array_is_read(tmp_path):
    save_steps(tmp_path, [10])
    shutil.rmtree(tmp_path / "checkpoints" / "10" / "trainable")

    def refuse(meta):
        raise UserError(f"seed {meta['config']['seed']}")

    with pytest.raises(UserError, match="seed 42"):
        restore(tmp_path, check=refuse)


def test_other_shapes_and_dtypes_are_errors_not_cast(tmp_path):
    save_steps(tmp_path, [10])
    params, opt_state = (abstract(tree) for tree in state_after(0))
    wider = {**params, "norm/weight": jax.ShapeDtypeStruct((32,), jnp.float32, sharding=params["norm/weight"].sharding)}
    with pytest.raises(UserError, match=r"norm/weight as float32\[16\], but this run has float32\[32\]"):
        restore(tmp_path, (wider, opt_state))
    half = {**params, "norm/weight": params["norm/weight"].update(dtype=jnp.bfloat16)}
    with pytest.raises(UserError, match=r"this run has bfloat16\[16\]"):
        restore(tmp_path, (half, opt_state))
    with pytest.raises(UserError, match="this run has nothing"):
        restore(tmp_path, ({path: params[path] for path in list(params)[:2]}, opt_state))


def test_restore_adapters_needs_no_optimizer_and_accepts_any_step(tmp_path):
    save_steps(tmp_path, [10, 20])
    shutil.rmtree(tmp_path / "checkpoints" / "20" / "optimizer")
    arrays, meta = restore_adapters(tmp_path)
    assert meta["step"] == 20
    assert {path: array.tobytes() for path, array in arrays.items()} == {
        path: np.asarray(array).tobytes() for path, array in state_after(20)[0].items()
    }
    assert restore_adapters(tmp_path, step=10)[1]["step"] == 10


def test_restore_adapters_explains_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint: it is not"):
        restore_adapters(tmp_path)
    save_steps(tmp_path, [10, 20])
    with pytest.raises(UserError, match="no checkpoint of step 15; available steps are 10, 20"):
        restore_adapters(tmp_path, step=15)
    shutil.rmtree(tmp_path / "checkpoints" / "20" / "trainable")
    with pytest.raises(UserError, match=r"is damaged.*other checkpoints: 10"):
        restore_adapters(tmp_path)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_message_and_keeps_the_previous_checkpoint(small_disk, asynchronous, capfd):
    run_dir = small_disk / "run"
    small, large = ({"norm/weight": jax.random.normal(jax.random.key(0), (size,))} for size in (1000, 500_000))
    count = {"count": jnp.int32(1)}

    def save_both():
        with Checkpointer(run_dir, keep=1, asynchronous=asynchronous) as checkpointer:
            checkpointer.save(1, small, count, META)
            checkpointer.save(2, large, count, META)

    with pytest.raises(UserError, match="checkpoints/2 cannot be written: No space left on device"):
        save_both()
    assert list_checkpoints(run_dir) == [1]
    with Checkpointer(run_dir, keep=1, asynchronous=asynchronous) as checkpointer:
        restored = checkpointer.restore(abstract(small), abstract(count), check=lambda meta: None, notify=print)
        assert np.asarray(restored.trainable["norm/weight"]).tobytes() == np.asarray(small["norm/weight"]).tobytes()
        checkpointer.save(2, small, count, META)
    assert list_checkpoints(run_dir) == [2]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EMFILE])
def test_an_unavailable_disk_differs_from_a_damaged_checkpoint(tmp_path, monkeypatch, number):
    """A network mount whose server is unavailable, with TensorStore's message."""
    save_steps(tmp_path, [10])

    def fail(*_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: Error reading local file: {os.strerror(number)}")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(UserError, match=f"checkpoints cannot be read: {os.strerror(number)}"):
            restore(tmp_path)
        patched.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(UserError, match=f"cannot be written: {os.strerror(number)}; earlier ones are intact"):
            save_steps(tmp_path, [20])
    assert list_checkpoints(tmp_path) == [10]
    assert restore(tmp_path)[0].step == 10


def test_a_path_that_is_a_file_is_one_message(tmp_path):
    (tmp_path / "run").write_text("not a directory")
    with pytest.raises(UserError, match="run/checkpoints cannot be written"):
        Checkpointer(tmp_path / "run", keep=1, asynchronous=False)


def test_a_kill_during_a_deletion_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(1, *state_after(1), META)

        def stop_half_way(directory, **_):
            next(path for path in Path(directory).rglob("*") if path.is_file()).unlink()
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", stop_half_way)
            with pytest.raises(KeyboardInterrupt):
                checkpointer.save(2, *state_after(2), META)
        assert list_checkpoints(tmp_path) == [2]
    with Checkpointer(tmp_path, keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(3, *state_after(3), META)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


SAVES_UNTIL_KILLED = """
import sys
from pathlib import Path
import test_checkpoint as t
with t.Checkpointer(Path(sys.argv[1]), keep=2, asynchronous=sys.argv[2] == "True") as checkpointer:
    restored = checkpointer.restore(*map(t.abstract, t.state_after(0)), check=lambda meta: None, notify=print)
    step = restored.step if restored else 0
    print("started", flush=True)
    while True:
        step += 1
        checkpointer.save(step, *t.state_after(step), t.META)
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_after_a_kill_at_any_time_it_continues_from_a_complete_checkpoint(tmp_path, asynchronous):
    random = np.random.default_rng(0)
    reached = 0
    for _ in range(12):
        command = [sys.executable, "-c", SAVES_UNTIL_KILLED, str(tmp_path), str(asynchronous)]
        saver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        with saver.stdout:
            assert saver.stdout.readline() == "started\n"
            time.sleep(random.uniform(0.3, 1.5))
            saver.kill()
            saver.wait()
        restored, messages = restore(tmp_path, keep=2)
        assert messages == []
        if restored is not None:
            assert_is_state_after(restored.step, restored)
            assert restored.step >= reached
            reached = restored.step
            # A kill between a save and the deletion of older checkpoints leaves one more, until the next save.
            assert len(list_checkpoints(tmp_path)) <= 6
    assert reached > 12


def test_writes_that_finish_after_a_failed_save_print_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    for _ in range(2):
        Checkpointer(tmp_path, keep=1, asynchronous=False).close()

    class Late:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    Late("Event loop is closed")
    assert capfd.readouterr().err == ""
    Late("something else")
    assert "something else" in capfd.readouterr().err
