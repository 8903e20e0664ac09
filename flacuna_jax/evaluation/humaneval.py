"""HumanEval (Chen et al., 2021, arXiv:2107.03374) in InstructEval's protocol: an instruction before the prompt,
sampling at temperature 0.1, and a clean-up of the answer that damages correct code.

File: HumanEval.jsonl.gz with {task_id, prompt, entry_point, canonical_solution, test}.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flacuna_jax.evaluation.benchmark import FEW_SHOT, Column
from flacuna_jax.evaluation.files import field, locate, read_rows
from flacuna_jax.evaluation.programs import CodeTask, code_benchmark

EXPECTED = 164
LAYOUT = "HumanEval.jsonl.gz of openai/human-eval (task_id, prompt, entry_point, test per line)"
INSTRUCTION = (
    "Please complete the following Python code without providing any additional tasks such as testing or explanations\n"
)
MAX_NEW_TOKENS = 512
TEMPERATURE = {1: 0.1, 10: 0.6, 100: 0.8}
"""Sampling temperature by the number of samples per problem."""
TOP_K = 50
"""The default of transformers' generate, which the original does not change."""


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str

    @property
    def question(self) -> str:
        return INSTRUCTION + self.prompt

    def program(self, completion: str) -> str:
        """The problem, the completion and its tests, as one program."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


def load(data: Path) -> CodeTask[Problem]:
    """Raises UserError if the file is missing or a line lacks a field."""
    path = locate(data, ["humaneval/HumanEval.jsonl*", "human_eval/HumanEval.jsonl*", "HumanEval.jsonl*"], LAYOUT)
    names = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
    return CodeTask(
        name="humaneval",
        problems=tuple(Problem(*(field(row, name) for name in names)) for row in read_rows(path)),
        completions={
            "faithful": lambda answer, problem: faithful_completion(answer),
            "corrected": corrected_completion,
        },
        temperature=lambda samples: TEMPERATURE.get(samples, 0.8),
        top_k=TOP_K,
        max_new_tokens=MAX_NEW_TOKENS,
        expected=EXPECTED,
    )


def faithful_completion(text: str) -> str:
    """The original's clean-up: every line's indent is padded to an even number, then only the text before the first
    blank line is kept. This breaks 34 of the 164 reference solutions."""
    lines = (" " * (_indent(line) % 2) + line for line in text.split("\n"))
    return "\n".join(lines).lstrip("\n").split("\n\n")[0]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_OUTSIDE = re.compile(r"^(?!def |class |async def |import |from |@|#|\s|[)\]}]|[A-Za-z_]\w* *=[^=])", re.MULTILINE)


def corrected_completion(text: str, problem: Problem) -> str:
    """The code in an answer, with its blank lines and indents.

    Code is extracted from a Markdown fence. If the answer repeats the function with its `def`, it follows the prompt's
    unfinished one. Otherwise it continues the body: its first line gets the body's indent (tokenizers drop the space
    that an answer begins with), and it ends at the first unindented line that is not a definition.
    """
    fenced = _FENCE.search(text)
    code = fenced.group(1) if fenced else text
    body = " " * (_indent(problem.prompt.rstrip().rsplit("\n", 1)[-1]) or 4)
    if re.search(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
        return f"{body}pass\n\n{code if fenced else _definitions(code)}"
    return _definitions(body + code.lstrip("\n").lstrip(" "))


def _definitions(code: str) -> str:
    outside = _OUTSIDE.search(code)
    return code[: outside.start()] if outside else code


BENCHMARK = code_benchmark("humaneval", load, Column(FEW_SHOT, "HumanEval (0-shot)", "humaneval", 0, "humaneval/0"))
