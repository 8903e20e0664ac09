"""Runs one benchmark on one language model. Everything that varies between benchmarks is in their own modules."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flacuna_jax.data.conversation import Template, Turn
from flacuna_jax.data.tokenization import tokenize_prompt
from flacuna_jax.evaluation import hhh, humaneval, impact
from flacuna_jax.evaluation.benchmark import AnswerTask, FittedPrompt, Question, fit_shots
from flacuna_jax.evaluation.judge import Judge
from flacuna_jax.evaluation.results import Outcome, TaskResult
from flacuna_jax.evaluation.sandbox import DEFAULT_LIMITS, Limits, Verdict, isolation, run_programs
from flacuna_jax.generation.language_model import Generation, GenerationRequest, LanguageModel, encode_prompt


def run_answers(task: AnswerTask, model: LanguageModel) -> TaskResult:
    """Generates the answer to every problem and scores it in every way that the task names.

    Where the faithful and the corrected question differ, both are asked. As in the original an answer may run past the
    model's context; a question that is longer than the context without any worked example loses tokens at its left
    (which its record says), where the original would run past the context with the prompt itself.
    """
    fitted: dict[tuple[Question, int], FittedPrompt] = {}

    def fit(question: Question) -> FittedPrompt:
        key = (question, len(question.shots))
        if key not in fitted:
            fitted[key] = fit_shots(question, lambda text: len(encode_prompt(model.tokenizer, text)), limit)
        return fitted[key]

    room = model.context_length
    limit = min(task.max_prompt, room)
    asked: list[FittedPrompt] = []
    for problem in task.problems:
        asked += [fit(problem.faithful), fit(problem.corrected)]
    requests = [
        GenerationRequest(encode_prompt(model.tokenizer, prompt.text)[-room:], task.max_new_tokens) for prompt in asked
    ]
    answers = model.generate(requests)
    outcomes, cut, unreachable = [], 0, 0
    for index, problem in enumerate(task.problems):
        pairs = [(asked[i], answers[i]) for i in (2 * index, 2 * index + 1)]
        (faithful, prediction), (corrected, corrected_prediction) = pairs
        scores = {
            name: score(prediction.text, problem.faithful)
            if name == "faithful"
            else score(corrected_prediction.text, problem.corrected)
            for name, score in task.scores.items()
        }
        record = _answer_record(problem.faithful, faithful, prediction, room)
        if corrected.text != faithful.text:
            record["corrected"] = _answer_record(problem.corrected, corrected, corrected_prediction, room)
        cut += faithful.tokens > room
        unreachable += len(model.tokenizer.encode(problem.faithful.label)) > task.max_new_tokens
        outcomes.append(Outcome(problem.id, problem.group, scores, record))
    notes = list(task.notes)
    if cut:
        notes.append(f"{cut} prompts longer than the context of {model.context_length} lost their beginning")
    if unreachable:
        notes.append(f"{unreachable} labels are longer than {task.max_new_tokens} tokens and cannot be matched")
    return TaskResult(
        task.name, task.shots, model.name, tuple(outcomes), task.average, task.expected, notes=tuple(notes)
    )


def _answer_record(question: Question, prompt: FittedPrompt, answer: Generation, room: int) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "shots": prompt.shots,
        "prompt_tokens": prompt.tokens,
        "tokens_cut": max(0, prompt.tokens - room),
        "label": question.label,
        "prediction": answer.text,
    }


def run_hhh(
    comparisons: Sequence[hhh.Comparison], model: LanguageModel, protocol: hhh.Protocol, repetitions: int = 1
) -> TaskResult:
    """Scores every comparison; the paper's protocol is repeated with other places of the good answer, and averaged.

    Records hold both prompts, and log-probabilities of A and B after the measured one, then after the reference.
    """
    repetitions = repetitions if protocol == "paper" else 1
    readings: tuple[Any, ...] = ("faithful", "corrected")
    runs = [hhh.prompts(comparisons, protocol, seed) for seed in range(repetitions)]
    asked = [
        request
        for prompts in runs
        for item in prompts
        for reading in readings
        for request in hhh.requests(item, model.tokenizer, reading)
    ]
    answers = iter(model.loglikelihood([replace(r, context=r.context[-model.context_length :]) for r in asked]))
    preferred: list[dict[str, list[float]]] = [{reading: [] for reading in readings} for _ in comparisons]
    records: list[list[dict[str, Any]]] = [[] for _ in comparisons]
    for prompts in runs:
        for into, told, item in zip(preferred, records, prompts, strict=True):
            told.append({"measured": item.measured, "reference": item.reference, "good": item.good})
            for reading in readings:
                scores = [next(answers) for _ in range(4)]
                into[reading].append(hhh.prefers_good(item, scores))
                told[-1][reading] = [score.log_probability for score in scores]
    outcomes = [
        Outcome(
            item.id,
            item.category,
            {reading: sum(values) / len(values) for reading, values in into.items()},
            {"prompts": told},
        )
        for item, into, told in zip(comparisons, preferred, records, strict=True)
    ]
    absent = hhh.missing(comparisons)
    notes = [f"categories missing: {', '.join(absent)}"] if absent else []
    for reading in readings:
        a, b = hhh.letter_ids(model.tokenizer, reading)
        if a == b:
            notes.append(f"{reading}: the tokenizer begins A and B with the same token, every comparison is a tie")
    return TaskResult(
        f"hhh_{protocol}",
        0,
        model.name,
        tuple(outcomes),
        "macro",
        hhh.EXPECTED,
        notes=tuple(notes),
        settings={"protocol": protocol, "repetitions": repetitions},
    )


def run_humaneval(
    problems: Sequence[humaneval.CodeProblem],
    model: LanguageModel,
    samples: int = 1,
    workers: int = 2,
    limits: Limits = DEFAULT_LIMITS,
) -> TaskResult:
    """Generates, cleans up both ways, runs. The caller has made sure that the user allows it
    (`sandbox.require_permission`). Seeds are derived from the problem and the sample, so that a run can be repeated."""
    temperature = humaneval.TEMPERATURE.get(samples, 0.8)
    requests = [
        GenerationRequest(
            # Answers may run past the context, as those of `run_answers`.
            encode_prompt(model.tokenizer, problem.question)[-model.context_length :],
            humaneval.MAX_NEW_TOKENS,
            temperature=temperature,
            top_k=humaneval.TOP_K,
            seed=_seed(problem.id, sample),
        )
        for problem in problems
        for sample in range(samples)
    ]
    answers = [generation.text for generation in model.generate(requests)]
    asked = [problem for problem in problems for _ in range(samples)]
    kept = {
        "faithful": [humaneval.faithful_completion(answer) for answer in answers],
        "corrected": [humaneval.corrected_completion(answer, p) for answer, p in zip(answers, asked, strict=True)],
    }
    programs = [p.program(code) for codes in kept.values() for p, code in zip(asked, codes, strict=True)]
    verdicts = run_programs(programs, limits, workers)
    judged = dict(zip(kept, (verdicts[: len(asked)], verdicts[len(asked) :]), strict=True))
    outcomes = []
    for index, problem in enumerate(problems):
        tries = slice(index * samples, (index + 1) * samples)
        scores: dict[str, float] = {}
        for k in (1, 10, 100):
            if k <= samples:
                for reading, all_verdicts in judged.items():
                    passed = sum(verdict.passed for verdict in all_verdicts[tries])
                    scores[reading if k == 1 else f"{reading}@{k}"] = humaneval.pass_at_k(samples, passed, k)
        record = {
            "prompt": problem.question,
            "predictions": answers[tries],
            **{reading: _code_record(kept[reading][tries], judged[reading][tries]) for reading in kept},
        }
        outcomes.append(Outcome(problem.id, "humaneval", scores, record))
    settings = {"samples": samples, "temperature": temperature, "isolation": list(isolation())}
    return TaskResult("humaneval", 0, model.name, tuple(outcomes), "micro", humaneval.EXPECTED, settings=settings)


def _code_record(codes: Sequence[str], verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    return [{"code": code, "verdict": verdict.reason} for code, verdict in zip(codes, verdicts, strict=True)]


def _seed(problem: str, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{problem} {sample}".encode()).digest()[:4], "big")


def run_impact(
    prompts: Sequence[impact.WritingPrompt],
    model: LanguageModel,
    judge: Judge | None,
    style: impact.Style = "raw",
    template: Template | None = None,
    temperature: float = 0.0,
) -> TaskResult:
    """Writes answers, has them judged (unless there is no judge), and counts code where none was asked for.

    Args:
      template: put questions as a user's turn into it; None gives the model the raw text, as the original does.
      temperature: 0 is what the original really did for LLaMA models; its card says 1.
    """
    render: Callable[[str], tuple[int, ...]] = lambda text: encode_prompt(model.tokenizer, text)  # noqa: E731
    if template is not None:
        render = lambda text: tuple(tokenize_prompt([Turn("user", text)], template, model.tokenizer))  # noqa: E731
    questions = [prompt.question(style) for prompt in prompts]
    room = max(1, min(impact.MAX_NEW_TOKENS, model.context_length // 2))
    requests = [
        GenerationRequest(
            render(question)[-(model.context_length - room) :],
            room,
            template.stop_strings if template else (),
            temperature=temperature,
            seed=_seed(prompt.id, 0),
            ends=template.ends if template else (),
        )
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    answers = [generation.text for generation in model.generate(requests)]
    reviews: dict[str, list[str]] = {}
    if judge is not None:
        for aspect in impact.JUDGE_TEMPLATES:
            pairs = zip(answers, prompts, strict=True)
            reviews[aspect] = judge.review([impact.judge_prompt(aspect, text, p.prompt) for text, p in pairs])
    outcomes = [
        _impact_outcome(prompt, questions[i], answers[i], {aspect: said[i] for aspect, said in reviews.items()})
        for i, prompt in enumerate(prompts)
    ]
    return TaskResult(
        "impact" if style == "raw" else "impact_output_prompt",
        0,
        model.name,
        tuple(outcomes),
        "micro",
        impact.EXPECTED,
        scale=1.0,
        notes=() if judge is not None else ("no judge: answers and the rate of code only",),
        settings={
            "style": style,
            "template": template.name if template else None,
            "temperature": temperature,
            "judge": judge.name if judge else None,
        },
    )


def _impact_outcome(prompt: impact.WritingPrompt, question: str, answer: str, reviews: dict[str, str]) -> Outcome:
    scores: dict[str, float | None] = {}
    for aspect, review in reviews.items():
        stated = impact.stated_score(review)
        scores[f"{aspect} faithful"] = impact.last_digit(review)
        scores[f"{aspect} corrected"] = stated
    unasked = not impact.asks_for_code(prompt.prompt)
    scores["unasked code"] = float(impact.contains_code(answer)) if unasked else None
    return Outcome(prompt.id, prompt.category, scores, {"prompt": question, "prediction": answer, "reviews": reviews})
