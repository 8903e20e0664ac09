"""Special tokens and simple tokenizers for tests, independent of the package's tokenizer code."""

from collections.abc import Sequence

from flacuna_jax.data.conversation import Template, named_template
from flacuna_jax.data.special_tokens import Special, SpecialTokens

LLAMA = SpecialTokens({"<unk>": Special(0), "<s>": Special(1), "</s>": Special(2)}, "<s>", "</s>")


def llama_template(name: str) -> Template:
    """A built-in format, or a .jinja file, with LLaMA's special tokens."""
    return named_template(name, LLAMA)


class Characters:
    """A tokenizer without files and without a dummy prefix: an id per character (or its low bits), 1 and 2 special."""

    special = LLAMA
    bos_id, eos_id, unk_id, vocab_size = 1, 2, None, 3 + 256
    prefix_ids = (1,)

    def encode(self, text: str, first: bool = True) -> list[int]:
        return [3 + ord(character) % 256 for character in text]

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token - 3) for token in ids if token >= 3)
