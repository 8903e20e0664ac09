"""Settings of the section `data`: records, and how they become rows of tokens."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flacuna_jax.config.types import AUTO, LocalPath, PositiveFloat, PositiveInt, Section, TemplateChoice


class SourceConfig(Section):
    path: LocalPath
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, optionally compressed), a directory, a pattern such as
    data/*.jsonl, or hf:NAME[@REVISION][:CONFIG[:SPLIT]], a dataset of the Hugging Face Hub. See
    docs/reference/data.md."""
    format: Literal[
        "auto",
        "flan_mini",
        "sharegpt",
        "messages",
        "alpaca",
        "dolly",
        "prompt_completion",
        "question_answer",
        "preference",
        "kto",
        "text",
    ] = "auto"
    """auto: detected from the fields of the first record of each file. text: no template is applied, and the loss
    covers every token."""
    split: str | None = None
    """Which split to read from a directory with several splits or from the Hub; null reads the training split: of a
    directory, all files whose names do not mark them as validation or test data; of the Hub, train."""
    weight: PositiveFloat = 1.0
    """Passes over the source per epoch. A fractional pass is a random subset, drawn with (seed, epoch)."""
    max_examples: PositiveInt | None = None
    """Use only this many records, the first ones in file order; null uses all."""


class DataConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Where the training records come from, one item per file, directory or dataset."""
    max_length: Annotated[int, Field(ge=8, le=2**20)] = 1280
    """Tokens of a row, and the most that an example may have."""
    over_length: Literal["drop", "truncate_prompt", "error"] = "drop"
    """What happens to examples longer than `max_length`. drop: they are left out and counted. truncate_prompt:
    questions are shortened, then whole exchanges are removed, but answers are never cut. error: the command ends."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens to records that cannot be used, for example with an unknown role. skip: they are counted."""
    packing: Literal["best_fit", "first_fit", "none"] = "best_fit"
    """How examples are put into rows. none: one example per row."""
    template: TemplateChoice = AUTO
    """How conversations become text: the name of a format, a .jinja file, or checkpoint for the chat template of the
    base model. auto: the base model's chat template if it has one, otherwise vicuna_v1.1."""
    template_variables: dict[str, bool | int | str] = Field(default_factory=dict)
    """Passed to a Jinja template together with the messages, for example enable_thinking: false."""
    tools_as_text: bool = False
    """Whether tools, tool calls, tool results and reasoning are written as plain text if the template does not support
    them. If false, a record that contains them is a bad record."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens the loss covers: every assistant turn, only the last assistant turn, or everything except BOS."""
    add_tokens: tuple[str, ...] = ()
    """New tokens, which the tokenizer finds in any text. The tables of the model get rows for them; see
    docs/reference/methods.md."""
    add_special_tokens: tuple[str, ...] = ()
    """New special tokens, which only templates can write, such as <|im_start|>."""

    @model_validator(mode="after")
    def tokens_are_new_once(self) -> "DataConfig":
        new = [token for token, _ in self.new_tokens]
        for token, special in self.new_tokens:
            if new.count(token) > 1:
                raise ValueError(f"add_tokens and add_special_tokens name {token!r} twice")
            if token != token.strip():
                key = "add_special_tokens" if special else "add_tokens"
                raise ValueError(f"{key}: {token!r} begins or ends with white space")
        return self

    @property
    def new_tokens(self) -> tuple[tuple[str, bool], ...]:
        """Spelling of each new token, and whether it is special, in the order of their ids."""
        return (*((token, False) for token in self.add_tokens), *((token, True) for token in self.add_special_tokens))
