"""The data of a run: tokenised, counted, and split into training and held-out examples."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.files import require_config
from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.build import build_store
from flacuna_jax.data.conversation import Template
from flacuna_jax.data.held_out import hold_out, keys, lowest, select
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.store_cache import cached_store, default_directory
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.huggingface.chat_template import describe_choice, open_template
from flacuna_jax.huggingface.tokenizer import load_tokenizer, tokenizer_fingerprint
from flacuna_jax.say import Say


class RunData(NamedTuple):
    """The examples of a run, and the tokenizer and template that produced them."""

    store: TokenStore
    """The training examples."""
    held_out: TokenStore | None
    """Examples that are evaluated and not trained on; None if the config has none."""
    report: DataReport
    """Counts of kept, changed and dropped records of the training data."""
    tokenizer: Tokenizer
    template: Template


def read_data(config: RunConfig, say: Say = lambda _: None, *, tokenizer: Tokenizer | None = None) -> RunData:
    """Tokenises the data of a run with its template, or finds them in the cache.

    Args:
      config: the config of the run.
      say: receives lines about the template, the cache and the records.
      tokenizer: the one at `config.model.tokenizer_path`, if it is loaded already.

    Raises:
      UserError: the tokenizer, the template or the data are not usable.
    """
    require_config(config)
    directory = config.model.tokenizer_path
    tokenizer = tokenizer or load_tokenizer(directory, config.data.new_tokens)
    template = open_template(config.data, directory, tokenizer)
    say(f"template   {describe_choice(config.data.template, directory)}")
    for note in template.notes:
        say(f"note       {note}")
    store, report = _tokenised(config, config.data, tokenizer, template, say)
    settings = config.evaluation
    store, held_out = hold_out(store, settings)
    if settings is not None and settings.sources:
        measured, _ = _tokenised(config, evaluation_data(config), tokenizer, template, say)
        found = keys(measured)
        held_out = select(measured, lowest(found, np.arange(len(measured)), settings.max_examples))
        common = int(np.isin(found, keys(store)).sum())
        if common:
            say(
                f"warning    {common:,} of {len(found):,} questions in evaluation.sources are also in the training data"
            )
    if held_out is not None:
        say(f"held out   {len(held_out):,} examples, {int(held_out.supervised.sum()):,} supervised tokens")
    return RunData(store, held_out, report, tokenizer, template)


def evaluation_data(config: RunConfig) -> DataConfig:
    """The settings for held-out records: those of the training data, except for `evaluation.sources`."""
    assert config.evaluation is not None, "only called if the config has an evaluation"
    return config.data.model_copy(update={"sources": config.evaluation.sources or config.data.sources})


def _tokenised(
    config: RunConfig, data: DataConfig, tokenizer: Tokenizer, template: Template, say: Say
) -> tuple[TokenStore, DataReport]:
    try:
        store, report = cached_corpus(config, tokenizer, template, default_directory(), say, data)
    except OSError as error:
        say(f"tokenised data: no cache ({error}); built in memory")
        store, report = build_store(data, tokenizer, template=template, examples=config.training.examples)
    for line in report.lines():
        say(line)
    return store, report


def cached_corpus(
    config: RunConfig, tokenizer: Tokenizer, template: Template, cache: Path, say: Say, data: DataConfig | None = None
) -> tuple[TokenStore, DataReport]:
    """The tokenised records of a run and their counts, from the cache directory if they are in it.

    Args:
      data: settings of other records; by default, of the training data.

    Raises:
      OSError: the cache cannot be written.
      UserError: the data are not usable.
    """
    data = data or config.data
    tokenizer_hash = tokenizer_fingerprint(config.model.tokenizer_path, data.new_tokens)
    return cached_store(data, tokenizer, tokenizer_hash, cache, say, template, config.training.examples)
