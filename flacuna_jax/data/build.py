"""Builds the tokenised corpus of a config: reads, tokenises, applies the length policy, and counts everything."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.types import AUTO, FALLBACK, Examples
from flacuna_jax.data.conversation import Conversation, Segment, Template, TemplateRefusal, named_template
from flacuna_jax.data.files import Place
from flacuna_jax.data.formats import IDENTICAL, read_source
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
ALONE = "no other answer, which KTO's estimate needs"

Located = tuple[int, Place, Conversation]
"""The number of a record in its source, its place, and its conversation."""
SHOWN_CHARACTERS = 20
"""Maximum number of unknown characters that the report lists."""

Example = tuple[Located, TokenizedExample]

Progress = Callable[[int], None]
"""Called periodically with the number of records read so far."""


def build_store(
    config: DataConfig,
    tokenizer: Tokenizer,
    on_progress: Progress | None = None,
    template: Template | None = None,
    examples: Examples = "answers",
) -> tuple[TokenStore, DataReport]:
    """Tokenises every source of a config.

    Args:
      template: None uses the one that `config` names, which must then not be that of a checkpoint.
      examples: The kind of examples that the records must have.

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
        build = SourceBuild(config, template, source, index, tokenizer, encoder, report, builder, examples)
        for _ in build.blocks():
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


def _together(conversation: Conversation, documents: list[TokenizedExample]) -> TokenizedExample:
    """The example of a conversation with one or two tokenised documents."""
    first = replace(documents[0], good=conversation.good)
    return first if len(documents) == 1 else first.followed_by(documents[1].ids, documents[1].loss_mask)


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
        examples: Examples = "answers",
    ) -> None:
        self._config, self._examples = config, examples
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
        for place, conversation in read_source(self._source, policy, self._examples):
            yield self._report.read - 1, place, conversation

    def _add(self, block: list[Located]) -> None:
        accepted, rendered = self._render(block)
        documents = [document for _, _, conversation in accepted for document in conversation.documents]
        tokenized = iter(tokenize_batch(documents, rendered, self._encoder, self._config.train_on))
        examples = [
            _together(conversation, [next(tokenized) for _ in conversation.documents])
            for _, _, conversation in accepted
        ]
        fitting = self._fitting(list(zip(accepted, examples, strict=True)))
        if self._examples == "labelled":
            fitting = self._fitting(self._with_other_answers(fitting))
        kept = [example for _, example in fitting]
        for (_, _, conversation), example in fitting:
            self._count_unknown(conversation, example)
        self.builder.add(self._index, kept, [record for (record, _, _), _ in fitting])
        self._report.kept += len(kept)
        self._report.tokens += sum(len(example.ids) for example in kept)
        self._report.supervised_tokens += sum(int(np.count_nonzero(example.loss_mask)) for example in kept)

    def _fitting(self, examples: list[Example]) -> list[Example]:
        fitted = [(located, self._fit(located[1], located[2], example)) for located, example in examples]
        return [(located, example) for located, example in fitted if example is not None]

    def _with_other_answers(self, examples: list[Example]) -> list[Example]:
        """Gives each labelled answer a second document: its prompt with the answer to the question before it in the
        block, for KTO's estimate of the divergence from the reference. The first gets the last one's answer."""
        if len(examples) == 1:
            self._report.drop(ALONE, examples[0][0][1])
            return []
        made = []
        for (located, example), (_, other) in zip(examples, [examples[-1], *examples[:-1]], strict=True):
            asked, answered = int(np.argmax(example.loss_mask)), int(np.argmax(other.loss_mask))
            ids = np.concatenate([example.ids[:asked], other.ids[answered:]])
            mask = np.concatenate([example.loss_mask[:asked], other.loss_mask[answered:]])
            made.append((located, example.followed_by(ids, mask)))
        return made

    def _render(self, block: list[Located]) -> tuple[list[Located], list[list[Segment]]]:
        """The conversations that the template supports, and the segments of their documents."""
        policy = BadRecordPolicy(self._report, self._config.on_bad_record)
        accepted: list[Located] = []
        rendered: list[list[Segment]] = []
        for record, place, conversation in block:
            try:
                documents = conversation.documents
                rendered += [segments_of(document, self._template, self._encoder.tokenizer) for document in documents]
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
        documents = example.documents
        if not all(document.loss_mask.any() for document in documents):
            self._report.drop(NO_LOSS, place)
            return None
        if conversation.rejected is not None and np.array_equal(documents[0].ids, documents[1].ids):
            self._report.drop(IDENTICAL, place)
            return None
        if length <= limit:
            return example
        if self._config.over_length == "error":
            others = "drop or truncate_prompt" if self._examples == "answers" else "drop"
            raise UserError(
                f"{place}: {length} tokens, more than data.max_length {limit} "
                f"(data.over_length: {others} would continue)"
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
