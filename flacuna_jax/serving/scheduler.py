"""Continuous batching: one thread owns the devices. At every turn, requests join free rows, prompts are filled in
pieces, and all rows advance by a few tokens."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.generation.answers import certain, ended
from flacuna_jax.generation.continuation import Chosen
from flacuna_jax.generation.decode import LogProbabilities
from flacuna_jax.generation.decoder import Decoder, Draw, Part
from flacuna_jax.generation.engine import draw_of
from flacuna_jax.serving.adapters import Models, Served
from flacuna_jax.serving.jobs import Failed, Finished, Job, Progress, TokenScore
from flacuna_jax.serving.metrics import Metrics

STEPS = 4
"""New tokens of every row in a turn."""
PIECE = 512
"""Maximum number of tokens of a prompt that are filled in a turn, so that other answers do not wait for long."""
SHORTEST = 64
"""Pieces are padded to this number of tokens times a power of two, so that few programs are compiled."""
ALTERNATIVES = 20
"""Most likely tokens that are scored if any request asks for scores; OpenAI's maximum."""
WORTH_SHARING = 16
"""Minimum number of common first tokens for which a row's cache is reused."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rows of the batch, tokens of a row, and waiting requests."""

    rows: int = 16
    context: int = 4096
    waiting: int = 256


@dataclasses.dataclass(eq=False)
class Row:
    """A job in a row: `filled` tokens of its prompt are in the cache, `shared` of them from an earlier job."""

    job: Job
    filled: int
    shared: int
    draw: Draw
    tokens: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    prompt_scores: list[TokenScore] = dataclasses.field(default_factory=list)
    told: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.job.request.prompt

    @property
    def is_filled(self) -> bool:
        return self.filled == len(self.prompt)

    @property
    def cached(self) -> tuple[int, ...]:
        """The tokens whose keys and values are in the cache."""
        return (*self.prompt[: self.filled], *self.tokens[:-1])


class Refused(Exception):
    """A request that is not accepted now: the status of HTTP and the reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Scheduler:
    """Runs jobs until `stop`. Methods may be called from any thread, except those of a turn."""

    def __init__(self, models: Models, tokenizer: Tokenizer, limits: Limits, metrics: Metrics) -> None:
        self.models, self.tokenizer, self.limits, self.metrics = models, tokenizer, limits, metrics
        self._ends = frozenset((tokenizer.eos_id,))
        self._waiting: deque[Job] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future]] = deque()
        self._rows: dict[int, Row] = {}
        self._held: dict[int, tuple[Served, tuple[int, ...]]] = {}
        """What the caches of free rows have, in the order in which they became free."""
        self._changed = threading.Condition()
        self._ending, self._stopped, self.deadline = False, False, float("inf")
        self._decoder = self._new_decoder()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        metrics.watch(self)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> int:
        return len(self._rows)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._ending

    def begin(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs. Raises Refused if there is no room for them, or the server ends."""
        with self._changed:
            if self._ending:
                raise Refused(503, "the server is shutting down")
            if len(self._waiting) + len(jobs) > self.limits.waiting:
                raise Refused(429, f"{len(self._waiting)} requests wait already; try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def call(self, task: Callable[[], Any]) -> Future:
        """Runs a function between two turns."""
        future: Future = Future()
        with self._changed:
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def replace(self, change: Callable[[Models], Models]) -> None:
        """Changes the models; called between two turns. Raises UserError as the change does, or if a model that it
        removes still answers."""
        models = change(self.models)
        removed = set(self.models.offered.values()) - set(models.offered.values())
        if any(row.job.model in removed for row in self._rows.values()):
            raise UserError("the model still answers requests; try again when they have ended")
        self._fail_waiting(lambda job: job.model in removed, Failed(404, "the model was unloaded"))
        self._held = {row: held for row, held in self._held.items() if held[0] not in removed}
        self.models, self._decoder.network = models, models.network

    def end(self, seconds: float) -> None:
        """Stops accepting jobs. Jobs that are still running after `seconds` fail."""
        with self._changed:
            self._ending, self.deadline = True, time.monotonic() + seconds
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after its turn; jobs that have not ended fail."""
        with self._changed:
            self._ending = self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _new_decoder(self) -> Decoder:
        self._rows, self._held = {}, {}
        network = self.models.network
        with jax.set_mesh(network.mesh):
            return Decoder(network, self.limits.rows, self.limits.context, own_columns=True)

    def _run(self) -> None:
        while self._wait():
            try:
                with jax.set_mesh(self.models.network.mesh):
                    self.turn()
            except Exception as error:
                self._recover(error)
        self._fail_all(Failed(503, "the server is shutting down"))

    def _wait(self) -> bool:
        """Waits for something to do. False if the thread shall end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting or self._rows or self._tasks)
            return not self._stopped

    def _recover(self, error: Exception) -> None:
        """The caches may have been given away to a failed computation, so every running answer is lost."""
        self.metrics.failures.inc()
        for row in self._rows.values():
            row.job.tell(Failed(500, f"the computation failed: {str(error)[:200] or type(error).__name__}"))
        self._decoder = self._new_decoder()

    def turn(self) -> None:
        """One step of everything that there is to do."""
        while self._tasks:
            _settle(*self._tasks.popleft())
        self._drop_unwanted()
        self._admit()
        self._fill()
        self._advance()

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        if now > self.deadline:
            self._fail_all(Failed(503, "the server is shutting down"))
        late = Failed(504, "the request took longer than the server allows")
        self._fail_waiting(lambda job: job.cancelled, None)
        self._fail_waiting(lambda job: now > job.deadline, late)
        for number, row in list(self._rows.items()):
            if row.job.cancelled or now > row.job.deadline:
                if not row.job.cancelled:
                    row.job.tell(late)
                self._free(number)

    def _fail_waiting(self, unwanted: Callable[[Job], bool], event: Failed | None) -> None:
        with self._changed:
            dropped = [job for job in self._waiting if unwanted(job)]
            if not dropped:
                return
            self._waiting = deque(job for job in self._waiting if not unwanted(job))
        for job in dropped:
            if event is not None:
                job.tell(event)

    def _fail_all(self, event: Failed) -> None:
        self._fail_waiting(lambda job: True, event)
        for number, row in list(self._rows.items()):
            row.job.tell(event)
            self._free(number)

    def _free(self, number: int) -> None:
        row = self._rows.pop(number)
        self._held.pop(number, None)
        self._held[number] = row.job.model, row.cached

    def _admit(self) -> None:
        while len(self._rows) < self.limits.rows:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            number, shared = self._place(job)
            self._held.pop(number, None)
            self._rows[number] = Row(job, shared, shared, draw_of(job.request))
            self.metrics.prompt_tokens.inc(len(job.request.prompt))
            self.metrics.shared_tokens.inc(shared)

    def _place(self, job: Job) -> tuple[int, int]:
        """A free row for a job, and the number of tokens of its prompt that the row's cache has already."""
        unused = [number for number in range(self.limits.rows) if number not in self._rows]
        number = next((number for number in unused if number not in self._held), next(iter(self._held), unused[0]))
        if job.scores_prompt:
            return number, 0
        caches = {**self._held, **{number: (row.job.model, row.cached) for number, row in self._rows.items()}}
        common = {
            other: _common(tokens, job.request.prompt[:-1])
            for other, (model, tokens) in caches.items()
            if model is job.model
        }
        source = max(common, key=lambda other: (common[other], other in self._held), default=number)
        shared = common.get(source, 0)
        if shared < WORTH_SHARING:
            return number, 0
        if source in self._held:
            return source, shared
        self._decoder.copy(source, number)
        return number, shared

    def _fill(self) -> None:
        at_once = max(1, self.limits.rows // 4)
        entering = [number for number, row in self._rows.items() if not row.is_filled][:at_once]
        if not entering:
            return
        size = max(SHORTEST, PIECE // len(entering))
        parts = {number: _part(self._rows[number], size) for number in entering}
        longest = max(len(part.tokens) for part in parts.values())
        length = max(SHORTEST, 1 << (longest - 1).bit_length())
        logits_rv, scores = self._decoder.fill(parts, at_once, ALTERNATIVES, length)
        for index, (number, part) in enumerate(parts.items()):
            row = self._rows[number]
            row.filled += len(part.tokens)
            if part.targets is not None and scores is not None:
                row.prompt_scores += _scores(part.targets, jax.tree.map(lambda x, i=index: x[i], scores))
        rows = [self._rows[number] for number in entering]
        if not any(row.is_filled for row in rows):
            return
        draws = [(number, row.draw) if row.is_filled else None for number, row in zip(entering, rows, strict=True)]
        alternatives = ALTERNATIVES if any(row.job.scored and row.is_filled for row in rows) else 0
        chosen = self._decoder.start(draws, logits_rv, alternatives)
        for index, (number, row) in enumerate(zip(entering, rows, strict=True)):
            if row.is_filled:
                self.metrics.first_token.observe(time.monotonic() - row.job.since)
                self._take(number, jax.tree.map(lambda x, i=index: x[i : i + 1], chosen))

    def _advance(self) -> None:
        active = {number: row for number, row in self._rows.items() if row.is_filled and row.tokens}
        if not active:
            return
        reach = max(len(row.prompt) + len(row.tokens) for row in active.values()) + STEPS
        samplings = [row.draw.sampling for row in active.values()]
        alternatives = ALTERNATIVES if any(row.job.scored for row in active.values()) else 0
        chosen = self._decoder.advance(STEPS, reach, samplings, alternatives)
        for number in active:
            self._take(number, jax.tree.map(lambda x, i=number: x[i], chosen))

    def _take(self, number: int, chosen: Chosen) -> None:
        """Adds new tokens to a row's answer, and ends it if it is complete."""
        row, request = self._rows[number], self._rows[number].job.request
        tokens = np.asarray(chosen.token).tolist()
        row.tokens += tokens
        if row.job.scored and chosen.log_probabilities is not None:
            row.scores += _scores(tokens, chosen.log_probabilities)
        generation = ended(row.tokens, request, self.tokenizer, self._ends | set(row.job.model.ends))
        if generation is not None:
            self.metrics.new_tokens.inc(generation.tokens)
            row.job.tell(Finished(generation, row.prompt_scores, row.scores[: generation.tokens], row.shared))
            self._free(number)
        elif row.job.streams:
            text = certain(self.tokenizer.decode(row.tokens), request.stop)
            if len(text) > row.told:
                row.job.tell(Progress(text[row.told :]))
                row.told = len(text)


def _settle(task: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)


def _part(row: Row, size: int) -> Part:
    """The next piece of a row's prompt."""
    piece = slice(row.filled, min(row.filled + size, len(row.prompt)))
    targets = row.prompt[piece.start + 1 : piece.stop + 1] if row.job.scores_prompt else None
    return Part(row.prompt[piece], row.filled, row.job.model.columns, targets)


def _scores(tokens: Sequence[int], found: LogProbabilities) -> list[TokenScore]:
    likely = zip(found.tokens_ba.tolist(), found.of_tokens_ba.tolist(), strict=True)
    rows = zip(tokens, found.of_token_b.tolist(), likely, strict=False)  # a piece is padded
    return [TokenScore(token, own, list(zip(*others, strict=True))) for token, own, others in rows]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
