"""Checkpoints of a run: trained weights, optimizer state and a JSON of everything else, written as one atomic whole.

A checkpoint is a directory `checkpoints/<step>/` with the items `trainable`, `optimizer` and `meta`. A rename makes it
visible when it is complete; in a bucket it is complete when its last object, commit_success.txt, exists. In addition to
the caller's values, `meta` records the shape and dtype of each array, and a checksum that does not depend on the
sharding, so that damaged bytes are detected and the previous checkpoint is used instead. Base weights are never saved
with adapters.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from flacuna_jax.errors import UserError
from flacuna_jax.storage.bucket import bucket_path, is_bucket
from flacuna_jax.storage.checkpoint_disk import (
    UnreadableCheckpoint,
    force_to_disk,
    ignore_late_callbacks,
    read_errors,
    write_errors,
)
from flacuna_jax.storage.checksum import checksums

Meta = dict[str, Any]

CHECKPOINTS = "checkpoints"
UNREADABLE = "unreadable_checkpoints"
_ITEMS = ("trainable", "optimizer", "meta")
_COMMITTED = "commit_success.txt"
_TEMPORARY = ".orbax-checkpoint-tmp"


@dataclass(frozen=True)
class Restored:
    step: int
    trainable: dict[str, jax.Array]
    opt_state: Any
    meta: Meta


class Checkpointer:
    """Saves and restores the checkpoints of one run directory; a context manager that finishes pending writes.

    Args:
      run_dir: the run's output directory, or the name of a bucket.
      keep: number of most recent checkpoints to keep, in addition to the `best` ones given to `save`. An old checkpoint
        is deleted only after the new one is on the disk.
      asynchronous: `save` returns when the arrays are copied from the devices. Useful for full fine-tuning; adapters
        are small.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, keep: int, asynchronous: bool) -> None:
        self._directory = _checkpoints_of(run_dir)
        self._keep = keep
        self._asynchronous = asynchronous
        self._unsettled: int | None = None
        self._best: frozenset[int] = frozenset()
        ignore_late_callbacks()
        with write_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True
            )
            self._manager = _open_manager(self._directory, options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if failure is None:  # otherwise report only the first error
                raise

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, trainable: dict[str, jax.Array], opt_state: Any, meta: Meta, best: Collection[int] = ()
    ) -> None:
        """Writes the state after `step` updates; does nothing if there is already a checkpoint of this step.

        The arrays may be donated as soon as this returns. This call does not delete checkpoints of the steps `best`.

        Raises:
          UserError: the disk is full or the directory cannot be written; earlier checkpoints are untouched.
        """
        self.wait()
        self._best = frozenset(best)
        if step in self.steps():
            return
        leaves = {**_describe("trainable", trainable), **_describe("optimizer", opt_state)}
        items = ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable),
            optimizer=ocp.args.StandardSave(opt_state),
            meta=ocp.args.JsonSave(_sealed({"step": step, "leaves": leaves, "meta": meta})),
        )
        with write_errors(self._directory / str(step)):
            self._manager.save(step, args=items, force=True)
        self._unsettled = step
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until saved checkpoints are complete and on the disk, and older ones beyond `keep` are deleted."""
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        with write_errors(self._directory / str(step)):
            self._manager.wait_until_finished()
            force_to_disk(self._directory / str(step))
            for old in self.steps()[: -self._keep]:
                if old not in self._best:
                    self._delete(old)

    def _delete(self, step: int) -> None:
        """Renames the directory before it deletes the files, so an interrupted deletion never leaves a directory that
        looks like a checkpoint."""
        if jax.process_index() == 0:
            if is_bucket(self._directory):
                (self._directory / str(step) / _COMMITTED).unlink(missing_ok=True)
            else:
                doomed = self._directory / f"{step}{_TEMPORARY}"
                (self._directory / str(step)).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)  # the next start removes remaining files
        self._manager.delete(step)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            with write_errors(self._directory):
                self._manager.close()

    def restore(
        self,
        trainable: dict[str, jax.ShapeDtypeStruct],
        opt_state: Any,
        *,
        check: Callable[[Meta], None],
        notify: Callable[[str], None],
    ) -> Restored | None:
        """Restores the newest intact checkpoint onto any number of devices; None if there is no checkpoint.

        Args:
          trainable: abstract arrays with the target shardings.
          opt_state: the abstract optimizer state with the target shardings.
          check: called with each candidate's meta before its arrays are read; raises `UserError` to reject the run.
          notify: called for every damaged checkpoint. Damaged ones are moved to `unreadable_checkpoints/` when an
            intact one is loaded, so that the run can save those steps again.

        Raises:
          UserError: no checkpoint is intact, or its parameters are not those of this run.
        """
        targets = {"trainable": trainable, "optimizer": opt_state}
        unreadable: list[int] = []
        for step in reversed(self.steps()):
            try:
                restored = _read(self._manager, step, targets, check)
            except UnreadableCheckpoint as error:
                notify(f"checkpoint {self._directory / str(step)} is damaged and was skipped: {error}")
                unreadable.append(step)
                continue
            self._set_aside(unreadable)
            return Restored(step, restored["trainable"], restored["optimizer"], restored["meta"])
        if unreadable:
            raise UserError(
                f"none of the {len(unreadable)} checkpoints in {self._directory} is intact; "
                "move that directory away to start again, or choose another output_dir"
            )
        return None

    def read_trainable(self, step: int, trainable: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The trained arrays of one checkpoint, with the target shardings. Raises UserError if it is damaged."""
        self.wait()
        try:
            restored = _read(self._manager, step, {"trainable": trainable}, check=lambda _: None)
        except UnreadableCheckpoint as error:
            raise UserError(f"checkpoint {self._directory / str(step)} is damaged: {error}") from None
        found: dict[str, jax.Array] = restored["trainable"]
        return found

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self._directory.parent / UNREADABLE
            aside.mkdir(exist_ok=True)
            if is_bucket(aside):
                (aside / "README.txt").write_text("Checkpoints that were damaged.")  # a bucket has no empty directory
            for step in steps:
                taken = len(list(aside.glob(f"{step}.*")))
                (self._directory / str(step)).rename(aside / f"{step}.{taken}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints are set aside")
        self._manager.reload()


def checksum(arrays: Mapping[str, jax.Array]) -> str:
    """A checksum of all bytes of all arrays; the same for every sharding."""
    return _sha256(_describe("base", dict(arrays)))[:32]


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending; empty if there are none."""
    directory = _checkpoints_of(run_dir)
    if not directory.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def restore_adapters(run_dir: str | os.PathLike[str], step: int | None = None) -> tuple[dict[str, np.ndarray], Meta]:
    """Reads the trained weights of a run into host memory, without its optimizer state, and the checkpoint's meta.

    Args:
      run_dir: a training output directory.
      step: the step of the checkpoint; None selects the newest.

    Returns:
      The flat dict of trained arrays (adapters, or every weight after full tuning) and the meta given to `save`.

    Raises:
      UserError: the checkpoint does not exist, or it is damaged.
    """
    steps = list_checkpoints(run_dir)
    if not steps:
        raise UserError(
            f"{run_dir} has no checkpoint: it is not a training output directory, or the run has not saved one yet"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{run_dir} has no checkpoint of step {step}; available steps are {', '.join(map(str, steps))}")
    directory = _checkpoints_of(run_dir)
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    on_host = jax.default_device(jax.local_devices(backend="cpu")[0])
    with on_host, _open_manager(directory, options) as manager:
        try:
            leaves = _read_sealed(manager, step)["leaves"]
            prefix = "trainable/"
            targets = {
                name.removeprefix(prefix): np.empty(leaf["shape"], jnp.dtype(leaf["dtype"]))
                for name, leaf in leaves.items()
                if name.startswith(prefix)
            }
            restored = _read(manager, step, {"trainable": targets}, check=lambda _: None)
        except UnreadableCheckpoint as error:
            others = [other for other in steps if other != step]
            hint = f"; other checkpoints: {', '.join(map(str, others))}" if others else ""
            raise UserError(f"checkpoint {directory / str(step)} is damaged: {error}{hint}") from None
    return restored["trainable"], restored["meta"]


def _checkpoints_of(run_dir: str | os.PathLike[str]) -> epath.Path:
    return bucket_path(str(run_dir if is_bucket(run_dir) else Path(run_dir).absolute())) / CHECKPOINTS


def _open_manager(directory: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    # Every failure raises an exception here; the library also logs it from each of its threads, with tracebacks.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    return ocp.CheckpointManager(directory, options=options, item_names=_ITEMS)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


# --- One checkpoint, read and verified ---------------------------------------------------------------------------


def _read(
    manager: ocp.CheckpointManager, step: int, targets: Mapping[str, Any], check: Callable[[Meta], None]
) -> dict[str, Any]:
    sealed = _read_sealed(manager, step)
    check(sealed["meta"])
    _same_arrays(sealed["leaves"], targets, f"checkpoint {manager.directory / str(step)}")
    with read_errors(manager.directory):
        items = manager.restore(
            step,
            args=ocp.args.Composite(**{name: ocp.args.StandardRestore(target) for name, target in targets.items()}),
        )
    for name in targets:
        for leaf_name, leaf in _describe(name, items[name]).items():
            if leaf != sealed["leaves"][leaf_name]:
                raise UnreadableCheckpoint(f"the bytes of {leaf_name} differ from the saved ones")
    return {**{name: items[name] for name in targets}, "meta": sealed["meta"]}


def _read_sealed(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    with read_errors(manager.directory):
        stored = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        body = stored["body"]
        intact = stored["sha256"] == _sha256(body) and body["step"] == step
    if not intact:
        raise UnreadableCheckpoint("its meta differs from the saved one")
    return body


def _same_arrays(leaves: Mapping[str, Any], targets: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a restore into other shapes or dtypes, which the library would silently cast or pad."""
    wanted = {
        leaf_name: f"{leaf.dtype}{list(leaf.shape)}"
        for name, target in targets.items()
        for leaf_name, leaf in _named_leaves(name, target)
    }
    saved = {
        leaf_name: f"{leaf['dtype']}{leaf['shape']}"
        for leaf_name, leaf in leaves.items()
        if leaf_name.partition("/")[0] in targets
    }
    for leaf_name in sorted(wanted.keys() | saved.keys()):
        if wanted.get(leaf_name) != saved.get(leaf_name):
            raise UserError(
                f"{where} has {leaf_name} as {saved.get(leaf_name, 'nothing')}, but this run has "
                f"{wanted.get(leaf_name, 'nothing')}: it belongs to another model or other lora settings"
            )


def _named_leaves(name: str, tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in leaves]


def _describe(name: str, tree: Any) -> dict[str, Any]:
    named = _named_leaves(name, tree)
    sums = checksums([leaf for _, leaf in named])
    return {
        leaf_name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": number}
        for (leaf_name, leaf), number in zip(named, sums, strict=True)
    }


def _sealed(body: dict[str, Any]) -> dict[str, Any]:
    body = json.loads(json.dumps(body))  # as it will be read back: lists for tuples, text for integer keys
    return {"body": body, "sha256": _sha256(body)}


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
