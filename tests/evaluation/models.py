"""Language models for tests: the trained small LLaMA, and one that answers from a table."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.generation.engine import LlamaLanguageModel
from flacuna_jax.generation.language_model import Generation, GenerationRequest, Score, ScoreRequest
from flacuna_jax.generation.settings import Placement
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.vocabularies import LLAMA


def story_model(directory: Path, devices: int = 1, **placement: int) -> LlamaLanguageModel:
    """The model in float32, so that results can be compared with torch's."""
    config = read_architecture(directory)
    spec = ModelSpec(config, None, "float32", "float32")
    mesh = make_mesh("auto", jax.devices()[:devices])
    params = load_base(str(directory), config, parameter_shardings(spec.base, mesh), "float32")
    return LlamaLanguageModel(
        spec, params, load_tokenizer(directory), mesh, "story", "story", placement=Placement(**placement)
    )


class Letters:
    """A tokenizer of single characters: ids are code points above three special ones."""

    special, prefix_ids, unk_id = LLAMA, (1,), None
    bos_id, eos_id, vocab_size = 1, 2, 3 + 0x110000

    def encode(self, text: str, first: bool = True) -> list[int]:
        return [3 + ord(c) for c in text]

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i - 3) for i in ids if i >= 3)


@dataclasses.dataclass
class Scripted:
    """Answers prompts by a function of their text, and records the prompts."""

    answer: Callable[[str], str] = lambda prompt: " A"
    log_probability: Callable[[str, str], float] = lambda context, continuation: -float(len(continuation))
    name: str = "scripted"
    fingerprint: str = "scripted"
    tokenizer: Tokenizer = dataclasses.field(default_factory=Letters)
    context_length: int = 1 << 20
    asked: list[str] = dataclasses.field(default_factory=list)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        prompts = [self.tokenizer.decode(request.prompt) for request in requests]
        self.asked += prompts
        return [Generation(self.answer(prompt), 1, "eos") for prompt in prompts]

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        decode = self.tokenizer.decode
        texts = [(decode(request.context), decode(request.continuation)) for request in requests]
        self.asked += [context for context, _ in texts]
        return [Score(self.log_probability(*text), False) for text in texts]
