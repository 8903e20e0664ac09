"""What the question-answering benchmarks share: questions with worked examples in front, fitted to the context."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

ScoreFunction = Callable[[str, "Question"], float]


@dataclass(frozen=True)
class Question:
    """One prompt in its parts: header, then worked examples, then the question that the model completes."""

    text: str
    label: str
    header: str = ""
    shots: tuple[str, ...] = ()

    def prompt(self, shots: int) -> str:
        """The prompt with the first `shots` worked examples."""
        return self.header + "".join(self.shots[:shots]) + self.text


@dataclass(frozen=True)
class Problem:
    """A question as the original reads it, and as the file has it where the original's reading loses something."""

    id: str
    group: str
    """Subject, task or category: what macro means and breakdowns run over."""
    faithful: Question
    corrected: Question


@dataclass(frozen=True)
class AnswerTask:
    """A benchmark whose model completes a prompt and whose answer is compared with a label.

    `average` "micro" is the mean over problems, "macro" the mean over groups of their means. `max_prompt` and
    `max_new_tokens` count tokens (a prompt's include BOS). `expected` is how many problems the published benchmark
    scores; another number makes a result incomplete, and tables say so. `scores` names the ways to score a prediction,
    "faithful" and "corrected" among them; all but "faithful" see the answer to the corrected question.
    """

    name: str
    shots: int
    problems: tuple[Problem, ...]
    max_prompt: int
    max_new_tokens: int
    average: Literal["micro", "macro"]
    scores: Mapping[str, ScoreFunction]
    expected: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedPrompt:
    text: str
    shots: int
    """Worked examples that are left."""
    tokens: int
    """Length of the prompt, BOS included."""


def fit_shots(question: Question, count_tokens: Callable[[str], int], limit: int) -> FittedPrompt:
    """Drops worked examples from the end until the prompt has at most `limit` tokens.

    A question that is too long by itself stays whole, as in the original.
    """
    for shots in range(len(question.shots), -1, -1):
        prompt = question.prompt(shots)
        tokens = count_tokens(prompt)
        if tokens <= limit or shots == 0:
            return FittedPrompt(prompt, shots, tokens)
    raise AssertionError("the loop returns at zero shots")
