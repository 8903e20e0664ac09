"""The language model of this package: log-likelihoods in packed rows, and generation in rows that are refilled when
answers end. For both, shared prefixes are computed once."""

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.compiler import release_programs
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.generation import shared_prefix
from flacuna_jax.generation.answers import certain, ended
from flacuna_jax.generation.caches import slots_for
from flacuna_jax.generation.decoder import Decoder, Draw, Network, Part, moves_below, on_host
from flacuna_jax.generation.language_model import Generation, GenerationRequest, Score, ScoreRequest
from flacuna_jax.generation.prefixes import Group, plan_prefixes
from flacuna_jax.generation.settings import Placement, Sampling
from flacuna_jax.generation.sizes import coarse_size, padded_size, power_of_two
from flacuna_jax.kernels.axes import BATCH_AXES
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import row_shards

STEPS = 16
"""New tokens per row between two checks for ended rows."""
FEW_STEPS = 4
"""The same for streaming, and for separate layers, where more steps are not one program either."""
WORTH_GATHERING = 32
"""Minimum number of tokens that may still be made for which programs with fewer rows are worth compiling."""


class Document(NamedTuple):
    """Input tokens that are computed once, and the (position, target, request) of each requested score."""

    tokens: tuple[int, ...]
    wanted: list[tuple[int, int, int]]

    @property
    def shareable(self) -> int:
        return min(position for position, _, _ in self.wanted)


@dataclass(frozen=True)
class LlamaLanguageModel:
    """Implements `language_model.LanguageModel`. `mesh` is the mesh of `params`. If it spans several processes, all of
    them must make the same requests at the same time, and get the same answers."""

    spec: ModelSpec
    params: Mapping[str, jax.Array]
    tokenizer: Tokenizer
    mesh: Mesh
    name: str = "model"
    fingerprint: str = ""
    placement: Placement = field(default=Placement())
    ends: tuple[int, ...] = ()
    """Tokens that end every answer, in addition to the tokenizer's EOS."""

    @property
    def context_length(self) -> int:
        return self.spec.config.context_length

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Raises UserError for a request with an empty context or continuation, longer than the model's context, or
        with an id that the model's tables do not have."""
        documents = self._documents(requests)
        log_probability = np.zeros(len(requests))
        is_greedy = np.ones(len(requests), bool)
        groups = plan_prefixes([d.tokens for d in documents], [d.shareable for d in documents])
        with jax.set_mesh(self.mesh):
            pending = [
                batch
                for group in groups
                for batch in self._score_group([documents[index] for index in group.members], group.length)
            ]
            # No result has been waited for so far, so the device computes while the next batch is prepared.
            for owners, log_probability_m, is_greedy_m in pending:
                count = len(owners)
                np.add.at(log_probability, owners, on_host(log_probability_m).astype(np.float64)[:count])
                np.logical_and.at(is_greedy, owners, on_host(is_greedy_m)[:count])
        return [Score(float(p), bool(greedy)) for p, greedy in zip(log_probability, is_greedy, strict=True)]

    def _documents(self, requests: Sequence[ScoreRequest]) -> list[Document]:
        """Merges requests with the same inputs (one-token answers to one question) into one document."""
        documents: dict[tuple[int, ...], Document] = {}
        for index, request in enumerate(requests):
            tokens = (request.context + request.continuation)[:-1]
            if not request.context or not request.continuation:
                raise UserError(f"score request {index + 1} has no {'continuation' if request.context else 'context'}")
            if len(tokens) > self.context_length:
                raise UserError(
                    f"score request {index + 1} has {len(tokens)} tokens; the model's context is {self.context_length}"
                )
            self._check_ids(f"score request {index + 1}", request.context + request.continuation)
            document = documents.setdefault(tokens, Document(tokens, []))
            first = len(request.context) - 1
            document.wanted.extend((first + i, target, index) for i, target in enumerate(request.continuation))
        return list(documents.values())

    def _score_group(self, documents: list[Document], shared: int) -> Iterator[tuple[np.ndarray, jax.Array, jax.Array]]:
        release_programs()
        prefix = self._prefix(documents[0].tokens[:shared])
        lengths = [len(document.tokens) - shared for document in documents]
        row_length = max(min(self.placement.row_length, padded_size(sum(lengths))), padded_size(max(lengths)))
        shards = row_shards(self.mesh)
        rows = _pack(lengths, row_length)
        whole = min(self.placement.row_tokens // row_length, power_of_two(len(rows)))
        batch = max(1, whole // shards) * shards
        for begin in range(0, len(rows), batch):
            members = [[documents[index] for index in row] for row in rows[begin : begin + batch]]
            laid_out = _lay_out(members, shared, (batch, row_length))
            log_probability, is_greedy = shared_prefix.score(
                self.spec,
                self.params,
                prefix,
                *(self._place(rows_bt) for rows_bt in laid_out.rows),
                laid_out.at_m,
                laid_out.target_m,
            )
            yield laid_out.owners, log_probability, is_greedy

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Raises UserError for a prompt that is empty, longer than the context, or has an id that the model's tables do
        not have. Answers may exceed the context, as in transformers; protocols that must avoid this shorten their
        prompts."""
        self._check(requests)
        # Rows of a group share the size of their caches.
        sizes: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            sizes.setdefault(padded_size(request.max_new_tokens), []).append(index)
        finished: dict[int, Generation] = {}
        with jax.set_mesh(self.mesh):
            for indices in sizes.values():
                prompts = [requests[index].prompt for index in indices]
                for group in plan_prefixes(prompts, [len(prompt) - 1 for prompt in prompts]):
                    members = {indices[member]: requests[indices[member]] for member in group.members}
                    finished |= self._generate_group(members, group)
        return [finished[index] for index in range(len(requests))]

    def stream(self, request: GenerationRequest) -> Iterator[str]:
        """Yields the generation in pieces that later tokens cannot change: without incomplete characters or the
        beginning of a stop string."""
        self._check([request])
        draw = draw_of(request)
        told = 0
        with jax.set_mesh(self.mesh):
            slots = slots_for(len(request.prompt) + request.max_new_tokens)
            decoder = Decoder(self.network, row_shards(self.mesh), slots)
            tokens = decoder.begin({0: (Part(request.prompt), draw)}).tolist()
        while (generation := self._ended(tokens, request)) is None:
            text = certain(self.tokenizer.decode(tokens), request.stop)
            yield text[told:]
            told = max(told, len(text))
            with jax.set_mesh(self.mesh):
                tokens += decoder.advance(FEW_STEPS, slots, [draw.sampling]).token[0].tolist()
        yield generation.text[told:]

    def _check(self, requests: Sequence[GenerationRequest]) -> None:
        for index, request in enumerate(requests):
            if not request.prompt:
                raise UserError(f"prompt {index + 1} is empty")
            if len(request.prompt) > self.context_length:
                raise UserError(
                    f"prompt {index + 1} has {len(request.prompt)} tokens; the model's context is {self.context_length}"
                )
            self._check_ids(f"prompt {index + 1}", request.prompt)

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        rows = self.spec.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < rows:
            wrong = next(number for number in ids if not 0 <= number < rows)
            raise UserError(f"{what} has the token id {wrong}, but the model's tables have {rows} rows")

    @functools.cached_property
    def network(self) -> Network:
        return Network(self.spec, self.params, self.mesh)

    def _ended(self, tokens: Sequence[int], request: GenerationRequest) -> Generation | None:
        return ended(tokens, request, self.tokenizer, frozenset((self.tokenizer.eos_id, *self.ends)))

    def _generate_group(self, requests: dict[int, GenerationRequest], group: Group) -> dict[int, Generation]:
        release_programs()
        shared = group.length
        prefix = self._prefix(next(iter(requests.values())).prompt[:shared])
        # Long answers first, so that they do not run alone at the end.
        waiting = sorted(requests, key=lambda i: (requests[i].max_new_tokens, len(requests[i].prompt)))
        rest = {index: request.prompt[shared:] for index, request in requests.items()}
        slots = slots_for(max(len(rest[index]) + r.max_new_tokens for index, r in requests.items()))
        shards = row_shards(self.mesh)
        count = max(1, min(self.placement.rows, power_of_two(len(requests))) // shards) * shards
        counts = _row_counts(count)
        enough = max(1, count // 4)  # free rows for new prompts
        together = self.placement.row_length * shards  # tokens of prompts
        steps = STEPS if self.network.layers is None else FEW_STEPS
        steps = min(steps, max(r.max_new_tokens for r in requests.values()) - 1)
        decoder = Decoder(self.network, count, slots, prefix)
        occupied: dict[int, tuple[int, list[int]]] = {}
        finished: dict[int, Generation] = {}

        def settle(row: int, new: Sequence[int]) -> None:
            index, tokens = occupied[row]
            tokens.extend(new)
            generation = self._ended(tokens, requests[index])
            if generation is not None:
                finished[index] = generation
                del occupied[row]

        while waiting or occupied:
            free = [row for row in range(count) if row not in occupied]
            while waiting and free and (len(free) >= enough or len(waiting) <= len(free)):
                entering = dict(zip(free, _pop_some(waiting, rest, len(free), together), strict=False))
                occupied |= {row: (index, []) for row, index in entering.items()}
                first_r = decoder.begin(
                    {row: (Part(rest[index]), draw_of(requests[index])) for row, index in entering.items()}
                )
                for row, token in zip(entering, first_r.tolist(), strict=True):
                    settle(row, [token])
                free = [row for row in range(count) if row not in occupied]
            if occupied and steps:
                left = max(requests[index].max_new_tokens - len(made) for index, made in occupied.values())
                if not waiting and self.network.layers is not None and left >= WORTH_GATHERING:
                    _gather(decoder, occupied, counts)
                longest = max(len(rest[index]) + len(made) for index, made in occupied.values())
                samplings = [draw_of(requests[index]).sampling for index, _ in occupied.values()]
                new_bm = decoder.advance(steps, longest + steps, samplings).token
                for row, new in enumerate(new_bm.tolist()):
                    if row in occupied:
                        settle(row, new)
        return finished

    def _prefix(self, tokens: Sequence[int]) -> shared_prefix.Prefix | None:
        if not tokens:
            return None
        padded = np.zeros(coarse_size(len(tokens)), np.int32)
        padded[: len(tokens)] = tokens
        return shared_prefix.compute_prefix(self.spec, self.params, padded, np.int32(len(tokens)))

    def _place(self, rows_bt: np.ndarray) -> jax.Array:
        return jax.device_put(rows_bt, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))


def _pop_some(waiting: list[int], prompts: Mapping[int, Sequence[int]], most: int, tokens: int) -> list[int]:
    """Pops indices from the end: at most `most`, whose prompts have at most `tokens` tokens, or one longer prompt."""
    popped: list[int] = []
    while waiting and len(popped) < most and (not popped or len(prompts[waiting[-1]]) <= tokens):
        popped.append(waiting.pop())
        tokens -= len(prompts[popped[-1]])
    return popped


def _gather(decoder: Decoder, occupied: dict[int, tuple[int, list[int]]], counts: Sequence[int]) -> None:
    """Keeps the smallest of `counts` rows that is enough, because a CPU takes longer for more rows."""
    count = next(count for count in counts if count >= len(occupied))
    for row, target in moves_below(count, occupied).items():
        decoder.copy(row, target, decoder.rows.slots)
        occupied[target] = occupied.pop(row)
    decoder.keep(count)


def _row_counts(most: int) -> list[int]:
    """The numbers of rows that programs are compiled for: `most`, its halves, and three quarters of the larger ones."""
    halves = [most >> power for power in range(most.bit_length())]
    return sorted({*halves, *(3 * half // 4 for half in halves if half % 16 == 0)})


def draw_of(request: GenerationRequest) -> Draw:
    """The seed depends only on the request's seed and prompt, not on other requests."""
    seed = zlib.crc32(np.asarray(request.prompt, np.int32).tobytes(), request.seed & 0xFFFFFFFF)
    return Draw(Sampling(request.temperature, request.top_k, request.top_p), seed)


def _pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs indices into rows, first fit by decreasing length."""
    rows: list[list[int]] = []
    left: list[int] = []
    open_from, shortest = 0, min(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r in range(open_from, len(rows)) if left[r] >= lengths[index]), None)
        if row is None:
            rows.append([])
            left.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        left[row] -= lengths[index]
        while open_from < len(rows) and left[open_from] < shortest:
            open_from += 1
    return rows


class LaidOut(NamedTuple):
    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    """tokens, positions, segment ids."""
    at_m: np.ndarray
    target_m: np.ndarray
    owners: np.ndarray
    """The request of each scored position; shorter than `at_m`, which has padding."""


def _lay_out(rows: Sequence[Sequence[Document]], shared: int, shape: tuple[int, int]) -> LaidOut:
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    wanted: list[tuple[int, int, int]] = []
    for row, documents in enumerate(rows):
        begin = 0
        for segment, document in enumerate(documents, 1):
            rest = document.tokens[shared:]
            span = slice(begin, begin + len(rest))
            tokens[row, span], positions[row, span], segment_ids[row, span] = rest, range(len(rest)), segment
            base = row * shape[1] + begin - shared
            wanted.extend((base + position, target, owner) for position, target, owner in document.wanted)
            begin += len(rest)
    chunks = -(-len(wanted) // shared_prefix.SCORED_TOGETHER)
    size = shared_prefix.SCORED_TOGETHER * power_of_two(chunks)
    padded = np.zeros((size, 3), np.int32)
    padded[: len(wanted)] = wanted
    return LaidOut((tokens, positions, segment_ids), padded[:, 0], padded[:, 1], padded[: len(wanted), 2])
