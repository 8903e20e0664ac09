"""Builds the FLAN-mini collection, or reports a training config's data."""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.conversation import Conversation, Turn, named_template
from flacuna_jax.data.corpus_report import PackingFacts, run_document
from flacuna_jax.data.document import Document, to_html, to_markdown
from flacuna_jax.data.files import read_records
from flacuna_jax.data.formats import COLUMNS, read_source
from flacuna_jax.data.held_out import hold_out
from flacuna_jax.data.packing import epoch_examples
from flacuna_jax.data.pipeline import plan_steps
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.store import StoreBuilder, TokenStore, describe_document
from flacuna_jax.data.tokenization import TokenizedExample, Tokenizer, tokenize
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.collection import Built, build, find_inputs
from flacuna_jax.flan_mini.config import FlanMiniConfig, LeakageConfig
from flacuna_jax.flan_mini.leakage import BenchmarkLeakage, LeakageScan
from flacuna_jax.flan_mini.manifest import find_built, write_manifest
from flacuna_jax.flan_mini.report import leakage_parts, mixture_document
from flacuna_jax.flan_mini.work import writing
from flacuna_jax.huggingface.chat_template import describe_choice, open_template
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.tokenizer import load_tokenizer, tokenizer_fingerprint
from flacuna_jax.run.data import cached_corpus
from flacuna_jax.run.model import context_warning, network_sizes
from flacuna_jax.say import Say


def prepare_collection(config: FlanMiniConfig, *, show: int = 0, rebuild: bool = False, say: Say = print) -> Built:
    """Builds (or finds) the collection in `config.directory`, with manifest and report, and returns it."""
    _make_directory(config.directory, "output_dir")
    scan = _leakage_scan(config.leakage)
    directory = local_checkpoint(config.tokenizer, weights=False)
    tokenizer = load_tokenizer(directory)
    inputs = find_inputs(config, tokenizer_fingerprint(directory), say)
    found = find_built(config, inputs)
    if found.built is not None and not rebuild:
        say(f"hit: {found.built.path} is up to date ({found.why})")
        built = found.built
    else:
        say("building again, as requested" if found.built is not None else f"miss: building, {found.why}")
        built = build(config, inputs, partial(load_tokenizer, directory), say)
        write_manifest(config, inputs, built)
    leakage = _leakage(scan, _record_texts(built.path), say)
    document = mixture_document(config, built.accounts, built.statistics, leakage)
    _write_report(config.directory, document, say)
    say(f"{built.records:,} records in {built.path} (sha256 {built.sha256[:16]}…)")
    if show:
        _show_collection(config, built, tokenizer, show)
    return built


def prepare_run(
    config: RunConfig, cache: Path, output: str | None, show: int, benchmarks: dict[str, str], say: Say = print
) -> None:
    """Tokenises (or finds in the cache), packs and reports the data of a training config, without held-out records.

    Raises:
      UserError: the data cannot be used; or, after the report, a run with these settings would be refused.
    """
    _make_directory(cache, "--cache")
    if output is not None:
        _make_directory(Path(output), "--output")
    scan = _leakage_scan(LeakageConfig(files=benchmarks) if benchmarks else None)
    directory = config.model.tokenizer_path
    tokenizer = load_tokenizer(directory, config.data.new_tokens)
    template = open_template(config.data, directory, tokenizer)
    say(f"template: {describe_choice(config.data.template, directory)}")
    for note in template.notes:
        say(f"note: {note}")
    store, report = cached_corpus(config, tokenizer, template, cache, say)
    plan, measured, refused = None, None, None
    try:
        store, measured = hold_out(store, config.evaluation)
        plan = plan_steps(store, config.data, config.training, seed=config.seed, shards=None)
    except UserError as error:
        refused = error
    held_out: list[tuple[str, str]] = []
    if measured is not None:
        held_out = [("held out", f"{len(measured):,} examples, {int(measured.supervised.sum()):,} supervised tokens")]
    weights = [source.weight for source in config.data.sources]
    epoch = epoch_examples(store.source_index, weights, config.seed, 0)
    packing = PackingFacts.of(
        store.lengths[epoch],
        int(store.supervised[epoch].sum()),
        config.data.max_length,
        config.data.packing,
        config.seed,
    )
    batch = held_out
    if plan is not None:
        batch = [
            ("rows per step", f"{plan.rows_per_step:,}"),
            ("examples per step", plan.examples_of_a_step),
            ("optimizer steps", f"{plan.total_steps:,}"),
            *held_out,
        ]
    leakage = _leakage(scan, _source_texts(config), say)
    document = run_document(store, report, weights, epoch, packing, batch, leakage_parts(leakage, store.tasks))
    for line in report.lines():
        say(line)
    for warning in (*(plan.warnings if plan is not None else ()), *_context_warnings(config)):
        say(f"warning: {warning}")
    if output is not None:
        _write_report(Path(output), document, say)
    else:
        say("\n".join(f"{label}: {value}" for label, value in document.facts))
    if show:
        _show_store(store, tokenizer, show)
    if refused is not None:
        raise refused


def _context_warnings(config: RunConfig) -> list[str]:
    """A warning if rows are longer than the model's context; none if only a tokenizer exists yet."""
    try:
        sizes = network_sizes(config.model, config.data)
    except UserError:
        return []
    warning = context_warning(sizes, config.data.max_length)
    return [warning] if warning else []


def _make_directory(directory: Path, setting: str) -> None:
    """Creates a directory. Raises UserError, before any long work, if it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix="."):
            pass
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written to ({error.strerror}); choose another directory ({setting})"
        ) from None


Texts = Iterator[tuple[str, list[str], list[str]]]
"""The task, prompts and answers of each training record."""


def _leakage_scan(config: LeakageConfig | None) -> LeakageScan | None:
    """Reads the evaluation files, before any long work."""
    return None if config is None else LeakageScan(config.files, config.ngram)


def _leakage(scan: LeakageScan | None, records: Texts, say: Say) -> list[BenchmarkLeakage]:
    if scan is None:
        return []
    for task, prompts, answers in records:
        scan.add(task, prompts, answers)
    results = scan.finish()
    for one in results:
        share = f"{one.covered(0.5):,} of {one.items:,} items"
        say(f"leakage: {one.name}: {share} have half their n-grams in the training records")
    return results


def _record_texts(path: Path) -> Texts:
    for conversation in _conversations(path):
        yield conversation.source, *_by_role(conversation)


def _source_texts(config: RunConfig) -> Texts:
    for source in config.data.sources:
        policy = BadRecordPolicy(SourceReport(source.path), config.data.on_bad_record)
        for _, conversation in read_source(source, policy, config.training.examples):
            yield conversation.source, *_by_role(conversation)


def _by_role(conversation: Conversation) -> tuple[list[str], list[str]]:
    turns = [turn for document in conversation.documents for turn in document.turns]
    prompts, answers = (list(dict.fromkeys(t.text for t in turns if t.role == role)) for role in ("user", "assistant"))
    return prompts, answers


def _conversations(path: Path) -> Iterator[Conversation]:
    """Reads the records of a collection that this program wrote."""
    policy = BadRecordPolicy(SourceReport(str(path)), "error", "output")
    for raw in read_records(path, COLUMNS, policy):
        entries = raw.value["conversations"]
        system = entries[0]["value"] if entries[0]["from"] == "system" else None
        turns = [
            Turn("user" if entry["from"] == "human" else "assistant", entry["value"])
            for entry in entries
            if entry["from"] != "system"
        ]
        yield Conversation(raw.value["id"], raw.value["source"], tuple(turns), system)


def _write_report(directory: Path, document: Document, say: Say) -> None:
    for name, text in (("report.md", to_markdown(document)), ("report.html", to_html(document))):
        with writing(directory / name) as file:
            file.write(text)
    say("\n".join(f"{label}: {value}" for label, value in document.facts))
    say(f"report: {directory / 'report.md'}, {directory / 'report.html'}")


def _show_collection(config: FlanMiniConfig, built: Built, tokenizer: Tokenizer, count: int) -> None:
    source_of = {task: account.name for account in built.accounts for task in account.per_task}
    left = {account.name: count for account in built.accounts if account.records}
    builder = StoreBuilder(list(left), tokenizer.vocab_size)
    names = list(left)
    template = named_template(config.template, tokenizer.special)
    for conversation in _conversations(built.path):
        source = source_of[conversation.source]
        if left.get(source):
            left[source] -= 1
            example = tokenize(conversation, template, tokenizer)
            builder.add(names.index(source), [example], [0])
        elif not any(left.values()):
            break
    _show_store(builder.finish(), tokenizer, count)


def _show_store(store: TokenStore, tokenizer: Tokenizer, count: int) -> None:
    """Prints the first `count` examples of each source. Tokens with loss are green, special tokens are reversed.
    Without colours, ⟦⟧ enclose tokens with loss and ‹› a special token."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for source, name in enumerate(store.sources):
        members = [index for index in range(len(store)) if store.source_index[index] == source][:count]
        for index in members:
            example = store.example(index)
            supervised = int(example.loss_mask.sum())
            console.print(
                Text(f"── {name} · {example.source} · {example.id} · ", style="bold")
                + Text(f"{len(example.ids)} tokens, {supervised} with loss", style="bold")
            )
            for title, document in zip(_titles(example), example.documents, strict=True):
                if title:
                    console.print(Text(f"─ {title}", style="bold"))
                text = Text()
                for piece in describe_document(document, tokenizer):
                    plain = piece.text
                    if not console.is_terminal:
                        plain = f"‹{plain}›" if piece.special else plain
                        plain = f"⟦{plain}⟧" if piece.supervised else plain
                    style = "green" if piece.supervised else "dim"
                    text.append(plain, style=f"{style} reverse" if piece.special else style)
                console.print(text)
            console.print()


def _titles(example: TokenizedExample) -> tuple[str, ...]:
    """What each document of an example is; empty for the only one."""
    if example.first_length is None:
        return ("",)
    if example.good is None:
        return ("chosen", "rejected")
    return ("good" if example.good else "bad", "with the answer to another question, for KTO's reference point")
