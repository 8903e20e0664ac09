"""Runs lm-evaluation-harness on models of this package, with the harness's tasks, prompts and metrics.

The harness is an optional dependency (the `eval` extra). Its command line cannot load external models, so a model is
passed as an object: `simple_evaluate(model=HarnessModel(...))`, or `evaluate --protocol lm_eval`.

Numbers of this protocol and of InstructEval are not comparable; for example, the harness scores MMLU by
log-probability.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.data.conversation import Conversation, Role, Template, Turn, render, render_text
from flacuna_jax.data.special_tokens import Span
from flacuna_jax.errors import UserError
from flacuna_jax.generation.language_model import GenerationRequest, LanguageModel, ScoreRequest

try:
    import lm_eval
    import lm_eval.models
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"--protocol lm_eval needs lm-evaluation-harness: pip install 'flacuna-jax[eval]' ({error})"
    ) from None


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of request like its Hugging Face backend.

    Encoded text starts with BOS if the tokenizer adds it and the text does not start with BOS itself; `add_bos`
    overrides the tokenizer. Contexts that are too long are truncated on the left. `--apply_chat_template` uses
    `template`; after that, spellings of special tokens in texts are encoded as these tokens. A generation also ends
    when its text contains the spelling of EOS.
    """

    def __init__(
        self,
        model: LanguageModel,
        template: Template | None = None,
        max_gen_toks: int = 256,
        add_bos: bool | None = None,
    ) -> None:
        super().__init__()
        self.model, self.template, self.max_gen_toks, self.add_bos = model, template, max_gen_toks, add_bos
        self._special = model.tokenizer.special
        self._is_templated = False

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.model.tokenizer
        return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.model.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template:
            return None
        return self._template().jinja

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Formats the history with the template; with `add_generation_prompt` False, the last answer is not closed."""
        system = None
        if chat_history and chat_history[0]["role"] == "system":
            system, chat_history = chat_history[0]["content"], chat_history[1:]
        turns = tuple(Turn(_role(message["role"]), message["content"]) for message in chat_history)
        template = self._template()
        segments = render(Conversation("", "", turns, system), template)
        self._is_templated = True
        if not add_generation_prompt:  # drop the end of the answer and everything after it
            last = max(
                (i for i, segment in enumerate(segments) if segment.token is None and segment.supervised), default=-1
            )
            segments = segments[: last + 1] if last >= 0 else segments
        return render_text(segments)

    def _template(self) -> Template:
        if self.template is None:
            raise UserError("the chat template is missing; set it with --template")
        return self.template

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        begins_with_prefix = string.startswith(self._special.spellings[self.prefix_token_id])
        ids = (
            [] if add_special_tokens is False or (add_special_tokens is None and begins_with_prefix) else self._prefix()
        )
        parts = self._special.split(string) if self._is_templated or begins_with_prefix else [Span(string, None)]
        for part in parts:
            ids += [part.id] if part.id is not None else tokenizer.encode(part.text, first=not ids)
        return ids

    def _prefix(self) -> list[int]:
        tokenizer = self.model.tokenizer
        if self.add_bos is None or tokenizer.bos_id is None:
            return list(tokenizer.prefix_ids)
        return [tokenizer.bos_id] if self.add_bos else []

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for texts, context, continuation in requests:
            if not continuation:
                raise UserError(
                    f"the answer {texts and texts[1]!r} adds no token to its question when both are encoded together; "
                    "change the wording of the task's answers"
                )
            kept = (context + continuation)[-(self.max_length + 1) :]
            split = max(1, len(kept) - len(continuation))
            asked.append(ScoreRequest(tuple(kept[:split]), tuple(kept[split:])))
        answers = [(score.log_probability, score.is_greedy) for score in self.model.loglikelihood(asked)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of the context length that predict every token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._generation_request(*request.args) for request in requests]
        texts = [generation.text for generation in self.model.generate(asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation_request(self, context: str, settings: dict[str, Any]) -> GenerationRequest:
        known = normalize_gen_kwargs(settings, self.max_gen_toks)
        stop = handle_stop_sequences(known.get("until"), eos=self._special.eos)
        new = int(known["max_gen_toks"])
        if new >= self.max_length:
            raise UserError(f"the task requests {new} new tokens, but the model's context is only {self.max_length}")
        sampled = bool(known["do_sample"])  # without it, the other settings are ignored
        return GenerationRequest(
            tuple(self.tok_encode(context)[-(self.max_length - new) :]),
            new,
            tuple(term for term in stop if term),
            temperature=float(known["temperature"]) if sampled else 0.0,
            top_k=known.get("top_k") or None if sampled else None,  # 0 means all in transformers
            top_p=known.get("top_p") if sampled else None,
        )


def _role(name: str) -> Role:
    if name not in ("user", "assistant"):
        raise UserError(f"unknown role {name!r}; the template has the roles system, user and assistant")
    return name  # type: ignore[return-value]


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    template: Template | None = None,
    apply_chat_template: bool = False,
    add_bos: bool | None = None,
    shots: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
) -> dict[str, Any]:
    """Runs the harness on its own tasks or on those in task files below `include`, and returns its results.

    Raises:
      UserError: a task is unknown to the harness.
    """
    manager = _task_manager(tasks, include)
    results = lm_eval.simple_evaluate(
        model=HarnessModel(model, template, add_bos=add_bos),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        bootstrap_iters=1000,
    )
    assert results is not None, "simple_evaluate returns None only on ranks above 0"
    return dict(results)


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> None:
    """Raises UserError if a task is unknown to the harness."""
    _task_manager(tasks, include)


def _task_manager(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """A manager of the tasks. It reads the harness's own tasks, which takes a while, only if necessary."""
    if include is not None and not include.is_dir():
        raise UserError(f"{include}: no such directory of task files (--data, or evaluation.tasks.data)")
    own = None if include is None else str(include)
    managers = ([lambda: TaskManager(include_path=own, include_defaults=False)] if own else []) + [
        lambda: TaskManager(include_path=own)
    ]
    for make in managers:
        manager = make()
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(f"unknown lm_eval task {', '.join(unknown)}; `lm_eval ls tasks` lists all tasks")


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of `run_tasks` as a flat dict {"task/metric": value}, without standard errors."""
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, scores in results["results"].items()
        for name, value in scores.items()
        if isinstance(value, int | float) and "_stderr" not in name and name != "sample_len"
    }
