"""IMPACT, InstructEval's writing benchmark: 200 prompts in four categories, answers rated 1 to 5 by a judge for
relevance and coherence.

File: data.jsonl (or .parquet) with {Category, Definition, Prompt}; FastChat's question.jsonl {category, turns} works as
a substitute. The judge's templates are the original's, including indents.

The paper's README recommends its own prompt for writing (definition, question, "Output:"): `style="output"`. The
benchmark's prompt is `style="raw"`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from flacuna_jax.data.conversation import Template, Turn
from flacuna_jax.data.tokenization import tokenize_prompt
from flacuna_jax.evaluation.benchmark import Benchmark, Column, Options, Reading, Run, TableSpec, sampling_seed
from flacuna_jax.evaluation.files import Row, field, locate, read_rows
from flacuna_jax.evaluation.judge import Judge
from flacuna_jax.evaluation.results import Outcome, TaskResult
from flacuna_jax.evaluation.settings import IMPACT_NEW_TOKENS, IMPACT_PROMPT, IMPACT_TEMPERATURE
from flacuna_jax.generation.language_model import GenerationRequest, LanguageModel, encode_prompt
from flacuna_jax.generation.settings import Sampling

CATEGORIES = ("informative", "professional", "argumentative", "creative")
PER_CATEGORY = 50
EXPECTED = PER_CATEGORY * len(CATEGORIES)
MAX_NEW_TOKENS = IMPACT_NEW_TOKENS.default
LAYOUT = "IMPACT, data.jsonl of declare-lab/InstructEvalImpact (Category, Definition, Prompt per line)"
PATTERNS = ("data.jsonl", "*.parquet", "*question.jsonl")
Style = Literal["raw", "output"]
TASKS: dict[Style, str] = {"raw": "impact", "output": "impact_output_prompt"}
"""Names of the results."""
Aspect = Literal["relevance", "coherence"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)

_SCALE = "Select a suitable option number between 1 and 5 based on the options below."
_JUDGE_LINES: dict[Aspect, tuple[str, ...]] = {
    "relevance": (
        "Text: {text}",
        "",
        "Prompt: {prompt}",
        "",
        f"How relevant is the text to the prompt? {_SCALE}",
        "1. Inadequate: The text fails to provide any relevant information or insights related to the given prompt.",
        "2. Limited: The text may contain some relevant information, but significant gaps exist, and key aspects of "
        "the prompt are not adequately covered.",
        "3. Satisfactory: The text covers the main aspects of the prompt and provides relevant information, but it "
        "lacks depth and may not explore the topic in great detail.",
        "4. Proficient: The text provides a comprehensive response by addressing the key aspects of the prompt, "
        "offering relevant and well-supported information or arguments. ",
        "5. Excellent: The text thoroughly and thoughtfully addresses the prompt, demonstrating a comprehensive "
        "understanding of the topic. It offers insightful and original ideas, supported by relevant arguments and "
        "information.",
    ),
    "coherence": (
        "Text: {text}",
        "",
        f"How coherent is the text? {_SCALE}",
        "1. Inadequate: The text lacks logical organization, making it difficult to follow. Ideas are disjointed and "
        "phrased awkwardly, requiring significant effort to understand.",
        "2. Limited: The text demonstrates some attempt at organization, but there are significant gaps in coherence. "
        "Ideas may be loosely connected, and the arguments lack clarity.",
        "3. Satisfactory: The text generally follows a logical organization, but occasional disruptions or awkward "
        "phrasing may occur. There is an acceptable level of readability and understanding.",
        "4. Proficient: The text is clearly organized and easy to understand. Ideas and arguments flow smoothly, "
        "contributing to easy comprehension and a pleasant reading experience.",
        "5. Excellent: The text presents exceptionally coherent writing with a fluent and engaging flow of ideas, "
        "ensuring effortless comprehension and a delightful reading experience.",
    ),
}


def _judge_template(lines: tuple[str, ...]) -> str:
    """The original's text with the indents of its source: eight spaces before every line except the first and the empty
    one above the options, and at the end."""
    question, options = lines[:-5], lines[-5:]
    return ("\n" + 8 * " ").join(question) + "\n\n" + "".join(f"{8 * ' '}{option}\n" for option in options) + 8 * " "


JUDGE_TEMPLATES: dict[Aspect, str] = {aspect: _judge_template(lines) for aspect, lines in _JUDGE_LINES.items()}


@dataclass(frozen=True)
class WritingPrompt:
    id: str
    category: str
    definition: str
    prompt: str

    def question(self, style: Style) -> str:
        if style == "raw":
            return f"{self.definition} {self.prompt}".strip()
        return writing_prompt(self.definition, self.prompt)


def writing_prompt(definition: str, question: str) -> str:
    """The paper's prompt for writing, as the text of a user's turn: `{definition}.\\n\\n{question}\\nOutput:`."""
    task = definition.strip()
    if not task:
        return f"{question.strip()}\nOutput:"
    return f"{task if task[-1] in '.:!?' else task + '.'}\n\n{question.strip()}\nOutput:"


def load(data: Path) -> tuple[WritingPrompt, ...]:
    """Raises UserError if there is no file or a line lacks a field."""
    folders = ("impact/", "InstructEvalImpact/", "vicuna_eval_questions/")
    path = locate(data, [f"{folder}{name}" for folder in folders for name in PATTERNS], LAYOUT)
    return tuple(_read(index, row) for index, row in enumerate(read_rows(path)))


def _read(index: int, row: Row) -> WritingPrompt:
    if "turns" in row.value:
        return WritingPrompt(str(index), field(row, "category"), "", field(row, "turns", list)[0])
    category = field(row, "Category").strip().lower()
    return WritingPrompt(str(index), category, field(row, "Definition"), field(row, "Prompt"))


def judge_prompt(aspect: Aspect, text: str, prompt: str) -> str:
    return JUDGE_TEMPLATES[aspect].format(text=text, prompt=prompt)


def last_digit(review: str) -> int:
    """The original's reading of a review: its last digit, or 1 if it has no digit or the last one is not 1 to 5."""
    digits = [int(c) for c in review if c.isdigit() and c in "0123456789"]
    return digits[-1] if digits and 1 <= digits[-1] <= 5 else 1


def stated_score(review: str) -> int | None:
    """The first whole number from 1 to 5 that is not the scale itself ("between 1 and 5", "out of 5"); None if none."""
    text = re.sub(r"between 1 and 5|out of (?:5|five)|/ ?5|1 ?(?:-|–|to) ?5", " ", review, flags=re.IGNORECASE)
    found = re.search(r"(?<![\d.])([1-5])(?!\d|\.\d)", text)
    return int(found.group(1)) if found else None


_CODE = re.compile(
    r"```|^\s*(?:def \w+\(.*\).*:|class \w+.*:|import \w[\w.]*$|from \w[\w.]* import |#include\s*<"
    r"|public (?:static|class) |function \w*\(.*\)\s*\{|(?:var|let|const) \w+ = "
    r"|(?:print|console\.log|System\.out\.print\w*)\(.*\);?$"
    r"|for \w+ in .+:$|while .+:$|(?:el)?if .+:$|return .+;$|</?(?:html|div|script|body|head)\b|SELECT .+ FROM )",
    re.MULTILINE,
)
_ASKS_FOR_CODE = re.compile(
    r"\b(?:code|coding|program(?:s|ming)?|function|script|python|java(?:script)?|c\+\+|sql|html|css|algorithm|regex"
    r"|implement|class diagram|pseudocode)\b",
    re.IGNORECASE,
)


def contains_code(answer: str) -> bool:
    """Whether an answer contains code: a fence, or a line that only programs have."""
    return _CODE.search(answer) is not None


def asks_for_code(prompt: str) -> bool:
    return _ASKS_FOR_CODE.search(prompt) is not None


def run_impact(
    prompts: Sequence[WritingPrompt],
    model: LanguageModel,
    judge: Judge | None,
    style: Style = "raw",
    template: Template | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> TaskResult:
    """Generates answers, has the judge review them (if there is one), and counts code in answers that need none.

    Args:
      template: Chat template for the questions; None gives the model the raw text, as the original does.
      temperature: The original used 0 for LLaMA models, although its card says 1.
    """

    def encode(text: str) -> tuple[int, ...]:
        if template is None:
            return encode_prompt(model.tokenizer, text)
        return tuple(tokenize_prompt([Turn("user", text)], template, model.tokenizer))

    questions = [prompt.question(style) for prompt in prompts]
    new_tokens = max(1, min(max_new_tokens, model.context_length // 2))
    requests = [
        GenerationRequest(
            encode(question)[-(model.context_length - new_tokens) :],
            new_tokens,
            template.stop_strings if template else (),
            temperature=temperature,
            seed=sampling_seed(prompt.id),
            ends=template.ends if template else (),
        )
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    answers = [generation.text for generation in model.generate(requests)]
    reviews: dict[str, list[str]] = {}
    if judge is not None:
        for aspect in JUDGE_TEMPLATES:
            pairs = zip(answers, prompts, strict=True)
            reviews[aspect] = judge.review([judge_prompt(aspect, text, p.prompt) for text, p in pairs])
    outcomes = [
        _outcome(prompt, questions[i], answers[i], {aspect: texts[i] for aspect, texts in reviews.items()})
        for i, prompt in enumerate(prompts)
    ]
    return TaskResult(
        TASKS[style],
        0,
        model.name,
        tuple(outcomes),
        "micro",
        EXPECTED,
        scale=1.0,
        notes=() if judge is not None else ("no judge: answers and the rate of code only",),
        settings={
            "style": style,
            "template": template.name if template else None,
            "temperature": temperature,
            "max_new_tokens": new_tokens,
            "judge": judge.name if judge else None,
        },
    )


def _outcome(prompt: WritingPrompt, question: str, answer: str, reviews: dict[str, str]) -> Outcome:
    scores: dict[str, float | None] = {}
    for aspect, review in reviews.items():
        scores[f"{aspect} faithful"] = last_digit(review)
        scores[f"{aspect} corrected"] = stated_score(review)
    scores["unasked code"] = None if asks_for_code(prompt.prompt) else float(contains_code(answer))
    return Outcome(prompt.id, prompt.category, scores, {"prompt": question, "prediction": answer, "reviews": reviews})


STYLES: dict[str, tuple[Style, ...]] = {"raw": ("raw",), "output": ("output",), "both": ("raw", "output")}
"""The prompts for each choice of `IMPACT_PROMPT`."""


def _load(data: Path, options: Options) -> Run:
    temperature = options[IMPACT_TEMPERATURE]
    Sampling(temperature)  # raises UserError for a temperature that cannot be used
    prompts = load(data)[: options.limit]
    judge, templates = options.judge(), options.templates()
    return lambda model: [
        run_impact(prompts, model, judge, style, templates.get(model.name), temperature, options[IMPACT_NEW_TOKENS])
        for style in STYLES[options[IMPACT_PROMPT]]
    ]


def _columns(style: Style, title: str) -> Iterator[Column]:
    table, task = TableSpec(f"IMPACT, {title} prompt"), TASKS[style]
    readings: tuple[Reading, ...] = get_args(Reading)
    of_aspect = {aspect: {reading: f"{aspect} {reading}" for reading in readings} for aspect in ASPECTS}
    for category in CATEGORIES:
        for aspect, scores in of_aspect.items():
            heading, key = f"{category[:3].title()} {aspect[:3].title()}.", f"impact/{category}/{aspect}"
            yield Column(table, heading, task, 0, key, scores, category, PER_CATEGORY, decimals=2)
    for aspect, scores in of_aspect.items():
        yield Column(table, f"Avg {aspect[:3].title()}.", task, 0, f"impact/{aspect}", scores, decimals=2)
    yield Column(table, "Unasked code %", task, scores=dict.fromkeys(readings, "unasked code"), factor=100.0)


BENCHMARK = Benchmark(
    name="impact",
    load=_load,
    columns=(*_columns("raw", "benchmark's"), *_columns("output", "paper's")),
    uses_judge=True,
    uses_template=True,
)
