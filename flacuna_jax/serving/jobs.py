"""Jobs that the server submits to its scheduler, and the events that the scheduler reports."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flacuna_jax.generation.language_model import Generation, GenerationRequest
from flacuna_jax.serving.adapters import Served


class TokenScore(NamedTuple):
    """A token, its log-probability in nats (None for the first token of a prompt), and the most likely tokens with
    theirs."""

    token: int
    log_probability: float | None
    likely: Sequence[tuple[int, float]] = ()


class Progress(NamedTuple):
    """Text that later tokens cannot change, after what was told before, and the scores of its tokens if they were asked
    for."""

    text: str
    scores: Sequence[TokenScore] = ()


class Finished(NamedTuple):
    """The whole answer, with scores of all tokens of the prompt and of the answer if they were asked for."""

    generation: Generation
    prompt_scores: Sequence[TokenScore]
    scores: Sequence[TokenScore]
    end: TokenScore | None
    """The score of the token that ended the answer, if one did."""
    shared: int
    """Tokens of the prompt whose keys and values were already there."""


class Failed(NamedTuple):
    """The request could not be answered. `status` is that of HTTP."""

    status: int
    message: str


Event = Progress | Finished | Failed


@dataclasses.dataclass(eq=False)
class Job:
    """One answer to make.

    Attributes:
      tell: called by the scheduler's thread with each event; after Finished or Failed there are no others.
      deadline: on the clock of `time.monotonic`.
      streams: whether `tell` is also called with partial answers.
      scored: whether tokens of the answer are scored.
      scores_prompt: whether tokens of the prompt are scored.
      cancelled: set, from any thread, when the client no longer needs the answer.
    """

    model: Served
    request: GenerationRequest
    tell: Callable[[Event], None]
    deadline: float
    streams: bool = False
    scored: bool = False
    scores_prompt: bool = False
    cancelled: bool = False
    since: float = dataclasses.field(default_factory=time.monotonic)
