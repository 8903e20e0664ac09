"""Continuous batching: one thread owns the devices. At every turn, requests join free rows, prompts are filled, in
parts if they are long and together if they are short, and all rows advance by a few tokens."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.generation.answers import certain, ended
from flacuna_jax.generation.continuation import Chosen
from flacuna_jax.generation.decode import LogProbabilities
from flacuna_jax.generation.decoder import Decoder, Draw, Network, Part, moves_below
from flacuna_jax.generation.engine import draw_of
from flacuna_jax.serving.adapters import Models, Served
from flacuna_jax.serving.jobs import Failed, Finished, Job, Progress, TokenScore
from flacuna_jax.serving.metrics import Metrics
from flacuna_jax.serving.programs import LENGTHS, PARTS, CompiledPrograms

STEPS = 4
"""New tokens of every row in a turn."""
PATIENCE = 4
"""In a turn, prompts are filled for about this many times as long as the running answers took for their last step."""
ALTERNATIVES = 20
"""Most likely tokens that are scored if any request asks for scores; OpenAI's maximum."""
WORTH_SHARING = 64
"""Minimum number of common first tokens for which a row's cache is reused: reading the cache takes time as well."""


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
    """Characters of the answer in events so far."""
    told_tokens: int = 0
    """Tokens that are whole in them."""

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

    def __init__(self, models: Models, limits: Limits, metrics: Metrics) -> None:
        self.models, self.limits, self.metrics = models, limits, metrics
        self._waiting: deque[Job] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future]] = deque()
        self._rows: dict[int, Row] = {}
        self._held: dict[int, tuple[Served, tuple[int, ...]]] = {}
        """What the caches of free rows have, in the order in which they became free."""
        self._changed = threading.Condition()
        self._ending, self._stopped, self.deadline = False, False, float("inf")
        self._step_seconds = 0.0
        self._decoder = self._new_decoder()
        self._programs = self._decoder.programs = self._programs_for(models.network)
        self._changing, self._warm = threading.Lock(), False
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

    def warm_up(self) -> None:
        """Compiles the programs that first requests need, so that no client waits for them."""
        self._programs.compile_first()
        self._warm = True

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
        """Runs a function between two turns. Raises Refused if the server ends."""
        future: Future = Future()
        with self._changed:
            if self._stopped:
                raise Refused(503, "the server is shutting down")
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def change(self, change: Callable[[Models], Models]) -> None:
        """Changes the models. Programs are compiled before that if they need others; running answers go on meanwhile.

        Raises UserError as the change does, or if a model that it removes still answers.
        """
        with self._changing:
            models = change(self.models)
            programs = self._programs
            if models.network.spec != self.models.network.spec:
                programs = self._programs_for(models.network)
                if self._warm:
                    programs.compile_first()
            self.call(lambda: self._replace(models, programs)).result()

    def _replace(self, models: Models, programs: CompiledPrograms) -> None:
        removed = set(self.models.offered.values()) - set(models.offered.values())
        if any(row.job.model in removed for row in self._rows.values()):
            raise UserError("the model still answers requests; try again when they have ended")
        self._held = {row: held for row, held in self._held.items() if held[0] not in removed}
        if programs is not self._programs:
            self._programs.close()
        self.models, self._programs = models, programs
        self._decoder.network, self._decoder.programs = models.network, programs

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
        self._programs.close()

    def _new_decoder(self) -> Decoder:
        self._rows, self._held = {}, {}
        network = self.models.network
        with jax.set_mesh(network.mesh):
            return Decoder(network, self.limits.rows, self.limits.context, own_columns=True)

    def _programs_for(self, network: Network) -> CompiledPrograms:
        return CompiledPrograms(network, self._decoder.rows, STEPS, ALTERNATIVES)

    def _run(self) -> None:
        while self._wait():
            try:
                with jax.set_mesh(self.models.network.mesh):
                    self.turn()
            except Exception as error:
                self._recover(error)
        self._fail_all(Failed(503, "the server is shutting down"))
        while self._tasks:
            self._tasks.popleft()[1].set_exception(Refused(503, "the server is shutting down"))

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
        self._decoder.programs = self._programs

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
            if self.models.offered.get(job.model.name) is not job.model:
                job.tell(Failed(404, "the model was unloaded"))
                continue
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
        self._decoder.copy(source, number, shared)
        return number, shared

    def _fill(self) -> None:
        """Fills prompts in the order in which the requests came, at least one part. Running answers must not wait for
        long, but a step takes about as long for one answer as for several, so it is better to have more of them."""
        end = time.monotonic() + PATIENCE * self._step_seconds
        while any(not row.is_filled for row in self._rows.values()):
            self._fill_together(_parts_together(self._rows))
            if time.monotonic() > end and any(row.tokens for row in self._rows.values()):
                return

    def _fill_together(self, parts: dict[int, Part]) -> None:
        """Fills parts of prompts, and begins the answers to those that end."""
        logits_rv, scores = self._decoder.fill(parts, PARTS)
        ended: dict[int, int] = {}
        for index, (number, part) in enumerate(parts.items()):
            row = self._rows[number]
            row.filled += len(part.tokens)
            if part.targets is not None:
                row.prompt_scores += _scores(part.targets, scores[number])
            if row.is_filled:
                ended[index] = number
        if not ended:
            jax.block_until_ready(logits_rv)  # so that the time of filling is known
            return
        draws = [(ended[i], self._rows[ended[i]].draw) if i in ended else None for i in range(len(parts))]
        scored = any(self._rows[number].job.scored for number in ended.values())
        chosen = self._decoder.start(draws, logits_rv, scored)
        for index, number in ended.items():
            self.metrics.first_token.observe(time.monotonic() - self._rows[number].job.since)
            self._take(number, jax.tree.map(lambda x, i=index: x[i : i + 1], chosen))

    def _advance(self) -> None:
        self._gather_rows()
        active = {number: row for number, row in self._rows.items() if row.tokens}
        if not active:
            return
        reach = max(len(row.prompt) + len(row.tokens) for row in active.values()) + STEPS
        samplings = [row.draw.sampling for row in active.values()]
        scored = any(row.job.scored for row in active.values())
        begin = time.monotonic()
        chosen = self._decoder.advance(STEPS, reach, samplings, scored, max(active) + 1)
        self._step_seconds = time.monotonic() - begin
        for number in active:
            self._take(number, jax.tree.map(lambda x, i=number: x[i], chosen))

    def _gather_rows(self) -> None:
        """Moves answers to lower rows if a program with fewer rows can then be used."""
        count = next(count for count in self._programs.counts if count >= len(self._rows))
        for number, target in moves_below(count, self._rows, lambda lower: lower in self._held).items():
            row = self._rows[number]
            self._decoder.copy(number, target, len(row.cached))
            self._held.pop(target, None)
            self._held[number] = row.job.model, row.cached
            self._rows[target] = self._rows.pop(number)

    def _take(self, number: int, chosen: Chosen) -> None:
        """Adds new tokens to a row's answer, and ends it if it is complete."""
        row = self._rows[number]
        model, request = row.job.model, row.job.request
        tokens = np.asarray(chosen.token).tolist()
        row.tokens += tokens
        if row.job.scored and chosen.log_probabilities is not None:
            row.scores += _scores(tokens, chosen.log_probabilities)
        generation = ended(row.tokens, request, model.tokenizer, frozenset((model.tokenizer.eos_id, *model.ends)))
        if generation is not None:
            self.metrics.new_tokens.inc(generation.tokens)
            scores, end = row.scores[: generation.tokens], None
            if generation.finish == "eos" and row.job.scored:
                end = row.scores[generation.tokens]
            row.job.tell(Finished(generation, row.prompt_scores, scores, end, row.shared))
            self._free(number)
        elif row.job.streams:
            self._tell_progress(row)

    def _tell_progress(self, row: Row) -> None:
        decode, first = row.job.model.tokenizer.decode, row.told_tokens
        text = certain(decode(row.tokens), row.job.request.stop)
        if len(text) <= row.told:
            return
        if row.job.scored:
            while row.told_tokens < len(row.tokens) and len(decode(row.tokens[: row.told_tokens + 1])) <= len(text):
                row.told_tokens += 1
        row.job.tell(Progress(text[row.told :], row.scores[first : row.told_tokens]))
        row.told = len(text)


def _settle(task: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)


def _parts_together(rows: Mapping[int, Row]) -> dict[int, Part]:
    """The next part of the prompt that waits longest and, if the part begins the prompt, other whole prompts for the
    same adapter, as many as fit."""
    waiting = sorted((item for item in rows.items() if not item[1].is_filled), key=lambda item: item[1].job.since)
    number, row = waiting[0]
    first = _next_part(row)
    parts, left = {number: first}, LENGTHS[-1] - len(first.tokens)
    for number, row in waiting[1:] if first.start == 0 else ():
        fits = row.filled == 0 and len(row.prompt) <= left
        if fits and row.job.model.columns == first.columns and len(parts) < PARTS:
            parts[number] = _next_part(row)
            left -= len(row.prompt)
    return parts


def _next_part(row: Row) -> Part:
    """The next tokens of a row's prompt, as many as a program takes."""
    piece = slice(row.filled, min(row.filled + LENGTHS[-1], len(row.prompt)))
    targets = row.prompt[piece.start + 1 : piece.stop + 1] if row.job.scores_prompt else None
    return Part(row.prompt[piece], row.filled, row.job.model.columns, targets)


def _scores(tokens: Sequence[int], found: LogProbabilities) -> list[TokenScore]:
    likely = zip(found.tokens_ba.tolist(), found.of_tokens_ba.tolist(), strict=True)
    rows = zip(tokens, found.of_token_b.tolist(), likely, strict=False)  # the last token of a prompt has no target
    return [TokenScore(token, own, list(zip(*others, strict=True))) for token, own, others in rows]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
