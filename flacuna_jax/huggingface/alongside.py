"""Computes logits of the intended model and of the written model while the model is being written.

A model larger than memory is read only once: the values that go to disk also go through the network, side by side with
the values they were made from. They are the logits of the files if each file, read back, has the digest of the same
values in the same order, and its header lists them in that order, with their shapes and dtypes (`verify_digest`,
`verify_model`).
"""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.probe import Side, StreamedModel, Weights, probe_ids
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_parameters

_MOST_BYTES = 1 << 26
"""Bytes of values that wait for the network. `see` blocks above this limit, unless the network needs other values."""


class LogitsAlongside:
    """A network in its own thread that receives values as they are written, preferably in the order in which it needs
    them.

    Args:
      config: sizes.
      meant: the source of the values.
    """

    def __init__(self, config: LlamaConfig, meant: Side) -> None:
        self._config, self._base = config, base_parameters(config)
        self._ids = probe_ids(config)
        self._model = StreamedModel([meant, Side(self._found)], config, batch=1, slots=len(self._ids))
        self._seen: defaultdict[tuple[str, int], list[tuple[slice, np.ndarray]]] = defaultdict(list)
        self._held, self._starved, self._ended = 0, False, False
        self._news = threading.Condition()
        self._reopened: Weights | None = None
        self._worker = ThreadPoolExecutor(1)
        self._through = self._worker.submit(self._go_through)

    def __enter__(self) -> "LogitsAlongside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._worker.shutdown()

    def see(self, name: str, rows: slice, values: np.ndarray) -> None:
        """Receives some rows of the tensor that is written as `name`. Can be called from any thread."""
        for part in names.stored_parts(self._config)[name]:
            start, stop = max(rows.start, part.rows.start), min(rows.stop, part.rows.stop)
            if start < stop:
                own = slice(start - part.rows.start, stop - part.rows.start)
                self._see(part.path, part.layer or 0, own, values[start - rows.start : stop - rows.start])

    def _see(self, path: str, layer: int, rows: slice, values: np.ndarray) -> None:
        if self._base[path].kind == "table":
            looked_up = sorted({i for i in self._ids.tolist() if rows.start <= i < rows.stop})
            parts = [(slice(i, i + 1), values[i - rows.start : i - rows.start + 1].copy()) for i in looked_up]
        else:
            parts = [(rows, values)] if self._base[path].stacked else []
        with self._news:
            self._news.wait_for(lambda: self._held < _MOST_BYTES or self._starved or self._ended)
            self._seen[path, layer] += parts
            self._held += sum(part.nbytes for _, part in parts)
            self._news.notify_all()

    def both(self, reopened: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Logits [tokens, vocab] of the intended model and of the written one.

        Args:
          reopened: the complete files, from which the last norm and the head are read.

        Raises:
          ValueError: some values were never passed to `see`.
        """
        self._end()
        self._through.result()
        self._reopened = reopened
        meant, found = self._model.finish()
        return meant, found

    def _end(self) -> None:
        """Marks the end of the values; waiting for a missing value then raises an error."""
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _go_through(self) -> None:
        try:
            self._model.begin(self._ids[None])
            for layer in range(self._config.num_layers):
                self._model.through(layer)
        finally:
            self._end()

    def _found(self, path: str, layer: int, rows: slice) -> np.ndarray:
        """Waits for rows, and releases them: the network needs every row once, in order."""
        if self._reopened is not None:
            return self._reopened(path, layer, rows)
        start, stop, _ = rows.indices(self._base[path].layer_shape[0])
        with self._news:
            self._starved = True
            self._news.notify_all()
            self._news.wait_for(lambda: self._are_there(path, layer, start, stop) or self._ended)
            self._starved = False
            if not self._are_there(path, layer, start, stop):
                raise ValueError(f"rows {start} to {stop} of {path}, layer {layer}, were not seen")
            parts = sorted(self._seen[path, layer], key=_start)
            self._seen[path, layer] = [(held, values) for held, values in parts if held.stop > stop]
            self._held -= sum(values.nbytes for held, values in parts if held.stop <= stop)
            self._news.notify_all()
        overlapping = [(held.start, values) for held, values in parts if held.start < stop and start < held.stop]
        cut = [values[max(0, start - first) : stop - first] for first, values in overlapping]
        return cut[0] if len(cut) == 1 else np.concatenate(cut)

    def _are_there(self, path: str, layer: int, start: int, stop: int) -> bool:
        overlap = (min(held.stop, stop) - max(held.start, start) for held, _ in self._seen[path, layer])
        return sum(max(0, rows) for rows in overlap) == stop - start


def _start(part: tuple[slice, np.ndarray]) -> int:
    return part[0].start
