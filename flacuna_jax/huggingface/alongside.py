"""Logits of what a model is made from, and of what is written of it, made while its values pass by on their way out.

A model larger than memory is read once: what goes to the disk goes through the network at the same time, next to what
it was made from. That these are the logits of the files follows when a file that is read back has the digest of those
very values in their order, and its header names them in that order, with their shapes and dtypes (`verify_digest`,
`verify_model`).
"""

import threading
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.probe import Side, StreamedModel, Weights, probe_ids
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_shapes

_EMBEDDING = "embed_tokens/weight"
_BEGINNING = -1
"""The step before the layers: looking up the embedding."""


class LogitsAlongside:
    """A network that goes on, in a thread of its own, whenever all of a layer's values have been seen.

    Values are kept until their layer is through, those of two or three layers at most: whoever shows more waits.

    Args:
      config: sizes.
      meant: what the values are made from.
    """

    def __init__(self, config: LlamaConfig, meant: Side) -> None:
        self._config, self._shapes = config, base_shapes(config)
        self._ids_bt = probe_ids(config)[None]
        self._model = StreamedModel([meant, Side(self._found)], config, batch=1, slots=self._ids_bt.shape[1])
        self._seen: defaultdict[tuple[str, int], list[tuple[slice, np.ndarray]]] = defaultdict(list)
        self._reopened: Weights | None = None
        self._next, self._lock = _BEGINNING, threading.Lock()
        self._steps: deque[Future[None]] = deque()
        self._worker = ThreadPoolExecutor(1)

    def __enter__(self) -> "LogitsAlongside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(cancel_futures=True)

    def see(self, name: str, rows: slice, values: np.ndarray) -> None:
        """Takes some rows of the tensor that is written as `name`; from any thread, layer after layer."""
        place = names.parse_tensor_name(name)
        assert place is not None, name
        path, layer = place
        if layer is None and path != _EMBEDDING:
            return
        with self._lock:
            self._seen[path, layer or 0].append((rows, values))
            while self._next < self._config.num_layers and self._is_complete(self._next):
                self._steps.append(self._worker.submit(self._go_on, self._next))
                self._next += 1
            waiting = self._steps.popleft() if len(self._steps) > 1 else None
        if waiting is not None:
            waiting.result()

    def both(self, reopened: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Logits [tokens, vocab] of what is meant and of what was written.

        Args:
          reopened: the files, all of which are there now; the last norm and the head are read from them.

        Raises:
          ValueError: values of some layer were never seen.
        """
        if self._next < self._config.num_layers:
            raise ValueError(f"not all values of layer {self._next} were seen")
        while self._steps:
            self._steps.popleft().result()
        self._reopened = reopened
        meant, found = self._model.finish()
        return meant, found

    def _is_complete(self, step: int) -> bool:
        if step == _BEGINNING:
            return self._rows_seen(_EMBEDDING, 0) == self._shapes[_EMBEDDING][0]
        stacked = {path: shape[1] for path, shape in self._shapes.items() if names.is_stacked(path)}
        return all(self._rows_seen(path, step) == rows for path, rows in stacked.items())

    def _rows_seen(self, path: str, layer: int) -> int:
        return sum(len(values) for _, values in self._seen.get((path, layer), ()))

    def _go_on(self, step: int) -> None:
        if step == _BEGINNING:
            self._model.begin(self._ids_bt)
        else:
            self._model.through(step)
        with self._lock:
            for path, layer in list(self._seen):
                if layer == step or (step == _BEGINNING and path == _EMBEDDING):
                    del self._seen[path, layer]

    def _found(self, path: str, layer: int, rows: slice) -> np.ndarray:
        if self._reopened is not None:
            return self._reopened(path, layer, rows)
        parts = self._seen[path, layer]
        start, stop, _ = rows.indices(sum(len(values) for _, values in parts))
        overlapping = sorted((part for part in parts if part[0].start < stop and start < part[0].stop), key=_start)
        cut = [values[max(0, start - held.start) : stop - held.start] for held, values in overlapping]
        return cut[0] if len(cut) == 1 else np.concatenate(cut)


def _start(part: tuple[slice, np.ndarray]) -> int:
    return part[0].start
