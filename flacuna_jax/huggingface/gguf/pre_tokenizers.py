"""How byte-level vocabularies split text into words before merging, by llama.cpp's names (tokenizer.ggml.pre).

The patterns are those of the tokenizer.json files of the models for which the names were introduced.
"""

import dataclasses

import tokenizers
from tokenizers import pre_tokenizers

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_APOSTROPHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"


@dataclasses.dataclass(frozen=True)
class Splitting:
    """One way to split text.

    Attributes:
      patterns: regular expressions, applied one after another; each match is a part of its own.
      whole_words: whether a part that is in the vocabulary is not made by merges.
      adds_bos: whether BOS is put in front of a text if the file does not say so.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False

    @property
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT_2 = Splitting((_WORDS,))
_DIGITS = Splitting((_DIGIT, _WORDS))
_QWEN_2 = Splitting((rf"{_APOSTROPHES}|{_BEFORE}\p{{L}}+|\p{{N}}{_END}",))
_LLAMA_3 = Splitting((rf"{_APOSTROPHES}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}{_END}",), whole_words=True, adds_bos=True)
_CL100K = Splitting(_LLAMA_3.patterns)
_CASES = rf"{_BEFORE}{_UPPER}*{_LOWER}+", rf"{_BEFORE}{_UPPER}+{_LOWER}*"
_SLASHED = _END.replace(r"[\r\n]*", r"[\r\n/]*")
_TEKKEN = Splitting((rf"{_CASES[0]}|{_CASES[1]}|\p{{N}}{_SLASHED}",), whole_words=True, adds_bos=True)
_GPT_4O = Splitting((rf"{_CASES[0]}{_APOSTROPHES}?|{_CASES[1]}{_APOSTROPHES}?|\p{{N}}{{1,3}}{_SLASHED}",))
_DEFAULT = Splitting((r"[\p{P}\$\+<=>\^~\|]+", _WORDS.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"))

SPLITTINGS = {
    "gpt-2": _GPT_2,
    "smollm": _DIGITS,
    "qwen2": _QWEN_2,
    "llama-bpe": _LLAMA_3,
    "dbrx": _CL100K,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT_4O,
    "default": _DEFAULT,
    "olmo": _GPT_2,
    "phi-2": _GPT_2,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "command-r": _DIGITS,
    "deepseek-r1-qwen": _QWEN_2,
    "megrez": _QWEN_2,
    "stablelm2": _QWEN_2,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "pixtral": _LLAMA_3,
    "smaug-bpe": _CL100K,
    "llama4": _GPT_4O,
}
"""Name → splitting. A name that is written is the first with its splitting."""
