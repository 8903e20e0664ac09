"""Builds the tokenised corpus of a config: reads, tokenises, applies the length policy, and counts everything."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from flacuna_jax.config.schema import DataConfig, SourceConfig
from flacuna_jax.config.types import AUTO, FALLBACK
from flacuna_jax.data.conversation import Conversation, Segment, Template, TemplateRefusal, named_template
from flacuna_jax.data.files import Place
from flacuna_jax.data.formats import read_source
from flacuna_jax.data.over_length import Shortener
from flacuna_jax.data.report import BadRecordPolicy, DataReport, SourceReport
from flacuna_jax.data.store import StoreBuilder, TokenStore
from flacuna_jax.data.tokenization import SegmentEncoder, TokenizedExample, Tokenizer, segments_of, tokenize_batch
from flacuna_jax.errors import UserError

BLOCK = 512
"""Number of conversations that are tokenised together."""

OVER_LENGTH = "longer than data.max_length"
TRUNCATED = "question shortened to data.max_length"
TURNS_REMOVED = "turns removed to fit data.max_length"
ANSWER_TOO_LONG = "answer and shortened question longer than data.max_length"
NO_LOSS = "no supervised token"
REFUSED = "the template does not support the record"

Located = tuple[int, Place, Conversation]
"""The number of a record in its source, its place, and its conversation."""
SHOWN_CHARACTERS = 20
"""Maximum number of unknown characters that the report lists."""

Progress = Callable[[int], None]
"""Called periodically with the number of records read so far."""


def build_store(
    config: DataConfig,
    tokenizer: Tokenizer,
    on_progress: Progress | None = None,
    template: Template | None = None,
) -> tuple[TokenStore, DataReport]:
    """Tokenises every source of a config.

    Args:
      template: None uses the one that `config` names, which must then not be that of a checkpoint.

    Raises:
      UserError: The input is invalid, or a source yields no example.
    """
    template = template or template_without_checkpoint(config, tokenizer)
    builder = StoreBuilder([source.path for source in config.sources], tokenizer.vocab_size)
    encoder = SegmentEncoder(tokenizer)
    reports: list[SourceReport] = []
    for index, source in enumerate(config.sources):
        report = SourceReport(source.path)
        reports.append(report)
        for _ in SourceBuild(config, template, source, index, tokenizer, encoder, report, builder).blocks():
            if on_progress:
                on_progress(sum(r.read for r in reports))
        require_examples(report)
    return builder.finish(), DataReport(tuple(reports))


def template_without_checkpoint(config: DataConfig, tokenizer: Tokenizer) -> Template:
    """The template of a config for data without a checkpoint. Raises UserError if it needs a checkpoint."""
    name = FALLBACK if config.template == AUTO else config.template
    template = named_template(
        name, tokenizer.special, tools_as_text=config.tools_as_text, variables=config.template_variables
    )
    if template.untrainable is not None:
        raise UserError(f"data.template: {template.untrainable}")
    return template


def require_examples(report: SourceReport) -> None:
    """Raises UserError for a source that yielded no example."""
    if not report.kept:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in report.dropped.most_common())
        first = next((f"; first: {report.first_seen[reason]}" for reason, _ in report.dropped.most_common(1)), "")
        raise UserError(f"{report.path}: no usable example ({reasons or 'no records'}){first}")


class SourceBuild:
    """Adds the examples of one source to a store. `builder` may be replaced between blocks, to build it in parts."""

    def __init__(
        self,
        config: DataConfig,
        template: Template,
        source: SourceConfig,
        index: int,
        tokenizer: Tokenizer,
        encoder: SegmentEncoder,
        report: SourceReport,
        builder: StoreBuilder,
    ) -> None:
        self._config = config
        self._source = source
        self._index = index
        self._encoder = encoder
        self._report = report
        self.builder = builder
        self._tokenizer = tokenizer
        self._template = template
        self._shortener = Shortener(self._template, tokenizer, encoder, config.train_on, config.max_length)

    def blocks(self, passed: int = 0, report: SourceReport | None = None) -> Iterator[int]:
        """Adds the examples block by block, and yields the number of conversations so far after each block.

        To continue an interrupted build, give its last number as `passed` and its counts as `report`: the first
        `passed` conversations are read but not added, and then the counts are set to `report`.
        """
        wanted = self._source.max_examples
        conversations = self._read()
        if report is not None:
            for _ in islice(conversations, passed):
                pass
            self._report.__dict__.update(report.__dict__)
        while wanted is None or self._report.kept < wanted:
            # With a limit, a block contains at most the conversations still needed, so no record beyond it is read.
            size = BLOCK if wanted is None else min(BLOCK, wanted - self._report.kept)
            block = list(islice(conversations, size))
            if not block:
                break
            self._add(block)
            passed += len(block)
            yield passed

    def _read(self) -> Iterator[tuple[int, Place, Conversation]]:
        policy = BadRecordPolicy(self._report, self._config.on_bad_record)
        for place, conversation in read_source(self._source, policy):
            yield self._report.read - 1, place, conversation

    def _add(self, block: list[Located]) -> None:
        accepted, rendered = self._render(block)
        conversations = [conversation for _, _, conversation in accepted]
        examples = tokenize_batch(conversations, rendered, self._encoder, self._config.train_on)
        kept: list[TokenizedExample] = []
        records: list[int] = []
        for (record, place, conversation), example in zip(accepted, examples, strict=True):
            fitting = self._fit(place, conversation, example)
            if fitting is not None:
                kept.append(fitting)
                records.append(record)
                self._count_unknown(conversation, fitting)
        self.builder.add(self._index, kept, records)
        self._report.kept += len(kept)
        self._report.tokens += sum(len(example.ids) for example in kept)
        self._report.supervised_tokens += sum(int(np.count_nonzero(example.loss_mask)) for example in kept)

    def _render(self, block: list[Located]) -> tuple[list[Located], list[list[Segment]]]:
        """The conversations that the template supports, and their segments."""
        policy = BadRecordPolicy(self._report, self._config.on_bad_record)
        accepted: list[Located] = []
        rendered: list[list[Segment]] = []
        for record, place, conversation in block:
            try:
                rendered.append(segments_of(conversation, self._template, self._encoder.tokenizer))
                accepted.append((record, place, conversation))
            except TemplateRefusal as refusal:
                policy.reject(REFUSED, place, str(refusal))
        return accepted, rendered

    def _count_unknown(self, conversation: Conversation, example: TokenizedExample) -> None:
        """Counts unknown tokens with loss, and collects the characters that become them."""
        unknown_id = self._tokenizer.unk_id
        if unknown_id is None:
            return
        count = int(np.count_nonzero(example.ids[example.loss_mask] == unknown_id))
        self._report.unknown_tokens += count
        known = self._report.unknown_characters
        if count and len(known) < SHOWN_CHARACTERS:
            texts = "".join(turn.text for turn in conversation.turns if turn.role == "assistant")
            unknown = (c for c in dict.fromkeys(texts) if c not in known and c.isprintable() and not c.isspace())
            found = [c for c in unknown if unknown_id in self._tokenizer.encode(c)]
            self._report.unknown_characters = (known + "".join(found))[:SHOWN_CHARACTERS]

    def _fit(self, place: Place, conversation: Conversation, example: TokenizedExample) -> TokenizedExample | None:
        """The example, shortened to the length limit if necessary; None if it is dropped, which is counted."""
        length, limit = len(example.ids), self._config.max_length
        if not example.loss_mask.any():
            self._report.drop(NO_LOSS, place)
            return None
        if length <= limit:
            return example
        if self._config.over_length == "error":
            raise UserError(
                f"{place}: {length} tokens, more than data.max_length {limit} "
                "(data.over_length: drop or truncate_prompt would continue)"
            )
        shorter = None
        if self._config.over_length == "truncate_prompt":
            shorter = self._shortener.shorten(conversation, length)
        if shorter is None:
            reason = OVER_LENGTH if self._config.over_length == "drop" else ANSWER_TOO_LONG
            self._report.drop(reason, place, f"{length} tokens")
            self._report.tokens_lost += length
            return None
        self._report.change(TURNS_REMOVED if shorter.turns_removed else TRUNCATED, place)
        self._report.tokens_lost += length - len(shorter.example.ids)
        return shorter.example
