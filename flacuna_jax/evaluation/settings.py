"""The options that benchmarks add to `flacuna evaluate`: settings only, so that a command line can show them without
importing the benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from flacuna_jax.arguments import whole

T = TypeVar("T")


@dataclass(frozen=True)
class Setting(Generic[T]):
    """A command-line option; several benchmarks may share one."""

    readers: tuple[str, ...]
    """Names of the benchmarks that read it."""
    name: str
    """As a Python identifier: `impact_prompt` becomes `--impact-prompt`."""
    default: T
    parse: Callable[[str], T]
    """For argparse's `type`: raises ArgumentTypeError or ValueError."""
    help: str
    choices: tuple[T, ...] | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


SAMPLES = Setting(("humaneval",), "samples", 1, whole(1), "samples per problem (1, 10 or 100)")
REPETITIONS = Setting(
    ("hhh",), "repetitions", 1, whole(1), "how often the paper's protocol draws the places of the answers"
)
IMPACT_PROMPT = Setting(
    ("impact",),
    "impact_prompt",
    "raw",
    str,
    "the benchmark's prompt (raw) or the paper's (output)",
    ("raw", "output", "both"),
)
IMPACT_TEMPERATURE = Setting(
    ("impact",), "impact_temperature", 0.0, float, "its card says 1; LLaMA models were run greedily"
)
IMPACT_NEW_TOKENS = Setting(("impact",), "impact_new_tokens", 1024, whole(1), "maximum length of an answer in tokens")
MMLU_SPLIT = Setting(
    ("mmlu",), "mmlu_split", "test", str, "the questions to answer; worked examples are those of dev", ("test", "val")
)
SETTINGS: tuple[Setting, ...] = (
    SAMPLES, REPETITIONS, IMPACT_PROMPT, IMPACT_TEMPERATURE, IMPACT_NEW_TOKENS, MMLU_SPLIT,
)  # fmt: skip

EXECUTING_CODE = ("humaneval",)
"""Benchmarks that run code that the model wrote."""
IN_TEMPLATE = ("impact",)
"""Benchmarks that format prompts with the template of `--template`."""
