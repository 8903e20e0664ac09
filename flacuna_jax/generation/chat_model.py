"""A language model together with the template that it is addressed in: text and turns in, text out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from flacuna_jax.data.conversation import Conversation, Template, TemplateRefusal, Turn
from flacuna_jax.data.tokenization import Tokenizer, tokenize, tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.generation.engine import LlamaLanguageModel
from flacuna_jax.generation.language_model import Generation, GenerationRequest, Score, ScoreRequest, encode_prompt
from flacuna_jax.generation.settings import Decoding

Prompt = str | Sequence[Turn]
"""What the user says, or a conversation that ends with a turn of the user."""


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """Made by `flacuna_jax.load_model`.

    Args:
      language_model: answers requests in token ids.
      template: wraps prompts; None takes them as they are, with BOS in front if the tokenizer adds it.
    """

    language_model: LlamaLanguageModel
    template: Template | None

    @property
    def name(self) -> str:
        return self.language_model.name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.language_model.tokenizer

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        return self.language_model.context_length

    @property
    def params(self) -> Mapping[str, jax.Array]:
        """All parameters by path, those of an adapter included."""
        return self.language_model.params

    def encode(self, prompt: Prompt, system: str | None = None) -> tuple[int, ...]:
        """Token ids of a prompt in the template, up to the beginning of the answer."""
        if self.template is not None:
            turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
            if not turns or turns[-1].role == "assistant":
                raise UserError("a conversation must end with a turn of the user or of a tool, which the model answers")
            try:
                return tuple(tokenize_prompt(turns, self.template, self.tokenizer, system))
            except TemplateRefusal as refusal:
                raise UserError(str(refusal)) from None
        if not isinstance(prompt, str):
            raise UserError("a conversation needs a template; load the model with one")
        return encode_prompt(self.tokenizer, prompt)

    def request(self, prompt: Prompt, decoding: Decoding = Decoding()) -> GenerationRequest:
        """The request for an answer, which may still be too long for the context."""
        sampling, template = decoding.sampling, self.template
        return GenerationRequest(
            self.encode(prompt, decoding.system),
            decoding.max_new_tokens,
            (*decoding.stop, *(template.stop_strings if template else ())),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            decoding.seed,
            template.ends if template else (),
        )

    def requests(self, prompts: Sequence[Prompt], decoding: Decoding = Decoding()) -> list[GenerationRequest]:
        """One request per prompt; equal prompts are sampled with different seeds.

        Raises:
          UserError: `prompts` is a single prompt, a prompt does not end with a turn of the user, or a prompt and its
            answer may exceed the model's context.
        """
        _require_list(prompts, "prompts")
        if decoding.max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {decoding.max_new_tokens}; it must be 0 or more")
        made = []
        for index, prompt in enumerate(prompts):
            request = self.request(prompt, dataclasses.replace(decoding, seed=decoding.seed + index))
            if len(request.prompt) + decoding.max_new_tokens > self.context_length:
                raise UserError(
                    f"prompt {index + 1} has {len(request.prompt)} tokens; with {decoding.max_new_tokens} new ones it "
                    f"exceeds the model's context of {self.context_length}: shorten the prompt or ask for fewer new "
                    "tokens"
                )
            made.append(request)
        return made

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding = Decoding()) -> list[Generation]:
        """The answers, in the order of the prompts. Raises UserError as `requests` does."""
        return self.language_model.generate(self.requests(prompts, decoding))

    def stream(self, prompt: Prompt, decoding: Decoding = Decoding()) -> Iterator[str]:
        """The answer in pieces, as they become certain."""
        return self.language_model.stream(self.request(prompt, decoding))

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], system: str | None = None) -> list[Score]:
        """Log-probability of each answer after its prompt, in nats.

        With a template, an answer is the tokens that training would supervise, the one that ends it included, so that
        the result is minus the training loss of the answer, summed. Without one, it is the text's tokens.

        Raises:
          UserError: the numbers of prompts and answers differ, or an answer is empty.
        """
        _require_list(prompts, "prompts")
        _require_list(answers, "answers")
        if len(prompts) != len(answers):
            raise UserError(f"{len(prompts)} prompts and {len(answers)} answers; give one answer per prompt")
        if "" in answers:
            raise UserError(f"answer {answers.index('') + 1} is empty; it has no tokens to score")
        pairs = zip(prompts, answers, strict=True)
        return self.language_model.loglikelihood([self._score_request(*pair, system) for pair in pairs])

    def _score_request(self, prompt: Prompt, answer: str, system: str | None) -> ScoreRequest:
        if self.template is None:
            return ScoreRequest(self.encode(prompt), tuple(self.tokenizer.encode(answer, first=False)))
        turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        conversation = Conversation("", "", (*turns, Turn("assistant", answer)), system)
        example = tokenize(conversation, self.template, self.tokenizer, "last")
        first, last = np.flatnonzero(example.loss_mask)[[0, -1]]
        ids = example.ids.tolist()
        return ScoreRequest(tuple(ids[:first]), tuple(ids[first : last + 1]))


def _require_list(values: Sequence[object], name: str) -> None:
    """A single prompt would be taken for a list of characters or of turns."""
    if isinstance(values, str) or (len(values) > 0 and isinstance(values[0], Turn)):
        raise UserError(f"{name} must be a list; put a single one into a list, too")
