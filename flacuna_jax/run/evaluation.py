"""Sets up the evaluation during training: held-out records, sample questions, benchmarks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.conversation import Template, Turn
from flacuna_jax.data.tokenization import Tokenizer, tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.suite import Evaluator, task_evaluator
from flacuna_jax.generation.engine import LlamaLanguageModel
from flacuna_jax.generation.language_model import GenerationRequest
from flacuna_jax.huggingface.answer_ends import answer_ends
from flacuna_jax.huggingface.chat_template import open_template
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.logs.metrics import JsonLines, Tracker
from flacuna_jax.model.parameters import Params
from flacuna_jax.model.sharding import batch_sharding, row_shards
from flacuna_jax.run.data import evaluation_data
from flacuna_jax.run.measurement import Measurement, Tasks
from flacuna_jax.run.samples import Question, Sampler, choose_questions
from flacuna_jax.run.setup import Setup
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.evaluator import lay_out
from flacuna_jax.training.history import History
from flacuna_jax.training.step import StepConfig


def read_tasks(config: RunConfig) -> Evaluator | None:
    """Reads and checks the benchmarks named in `evaluation.tasks`. Raises UserError, before the run starts."""
    settings = config.evaluation.tasks if config.evaluation else None
    if settings is None:
        return None
    directory = config.model.tokenizer_path
    is_harness = settings.protocol == "lm_eval"
    tokenizer = load_tokenizer(directory, config.data.new_tokens)
    template = open_template(config.data, directory, tokenizer) if is_harness else None
    return task_evaluator(
        settings.names, Path(settings.data), protocol=settings.protocol, limit=settings.limit, template=template
    )


def make_measurement(
    setup: Setup,
    step_config: StepConfig,
    base: Params,
    history: History,
    evaluator: Evaluator | None,
    tracker: Tracker,
    directory: RunDirectory,
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> Measurement | None:
    """The evaluation that the loop calls; None if the config has no evaluation."""
    config, settings = setup.config, setup.config.evaluation
    if settings is None:
        return None
    held_out = None
    if setup.held_out is not None:
        held_out = lay_out(
            setup.held_out,
            evaluation_data(config),
            config.training,
            step_config,
            batch_sharding(setup.mesh),
            row_shards(setup.mesh),
        )
    return Measurement(
        settings=settings,
        keep_best=config.checkpoint.keep_best,
        held_out=held_out,
        sampler=_sampler(setup),
        tasks=None if evaluator is None else _on_parameters(setup, evaluator),
        frozen=base,
        history=history,
        tracker=tracker,
        samples=lambda line: JsonLines.append(directory.samples, line) if jax.process_index() == 0 else None,
        say=say,
        stop=stop,
    )


def _sampler(setup: Setup) -> Sampler:
    settings, tokenizer = setup.config.evaluation, setup.tokenizer
    assert settings is not None, "the caller checks this"
    template = setup.template
    room = setup.source.config.context_length - settings.sample_tokens
    questions = []
    for number, text in enumerate(settings.prompts):
        ids = tuple(tokenize_prompt((Turn("user", text),), template, tokenizer))
        if len(ids) > room:
            raise UserError(
                f"evaluation.prompts.{number} and evaluation.sample_tokens {settings.sample_tokens} together exceed "
                f"the model's context of {setup.source.config.context_length} tokens; shorten one of them"
            )
        questions.append(Question(f"evaluation.prompts.{number}", ids, text, None))
    if setup.held_out is not None:
        questions += choose_questions(setup.held_out, settings.samples, room, tokenizer, _frame(template, tokenizer))

    def ask(params: Params, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        requests = [
            GenerationRequest(ids, settings.sample_tokens, template.stop_strings, ends=template.ends) for ids in prompts
        ]
        answers = _as_language_model(setup, params).generate(requests)
        return [f"{answer.text} …" if answer.finish == "length" else answer.text for answer in answers]

    return Sampler(questions, ask)


def _frame(template: Template, tokenizer: Tokenizer) -> tuple[str, str]:
    """The template's text before and after a question, as decoded by this tokenizer."""
    question = "QUESTION"
    ids = tokenize_prompt((Turn("user", question),), template, tokenizer)
    before, found, after = tokenizer.decode(ids).partition(question)
    return (before, after) if found else ("", "")


def _on_parameters(setup: Setup, evaluator: Evaluator) -> Tasks:
    return lambda params: evaluator(_as_language_model(setup, params))


def _as_language_model(setup: Setup, params: Params) -> LlamaLanguageModel:
    ends = answer_ends(None, setup.tokenizer, setup.config.model.path)
    return LlamaLanguageModel(setup.spec, params, setup.tokenizer, setup.mesh, "model in training", ends=ends)
