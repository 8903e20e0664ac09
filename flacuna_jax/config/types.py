"""Types of settings: ranges, paths, names of templates and modules, patterns; and the base class of every section."""

import difflib
import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
"""Valid names in `lora.targets`; a mistyped name is rejected before a model is opened. `model/llama.py` defines the
modules of a model; `lora.require_matches` compares the two."""
TARGETS: tuple[Target, ...] = get_args(Target)
HEAD: Target = "lm_head"
PROJECTIONS = tuple(target for target in TARGETS if target != HEAD)
ALL_LINEAR = "all-linear"

Examples = Literal["answers", "pairs", "labelled"]
"""What an objective trains on: conversations whose answers are imitated, pairs of a preferred and a rejected answer, or
single answers that are labelled good or bad."""

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
"""Sizes, steps and layer indices fit a signed 32-bit integer."""
PositiveFloat = Annotated[float, Field(gt=0, lt=3.4e38)]
"""Limited to the range of float32."""
Fraction = Annotated[float, Field(ge=0, lt=1)]


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or an address in its place (gs://..., hf:...). A leading ~ expands to the home directory, as in a shell."""

TEMPLATE_NAMES = ("vicuna_v1.1", "vicuna_v0", "llama-2-chat", "chatml", "alpaca", "plain")
AUTO, CHECKPOINT, FALLBACK = "auto", "checkpoint", "vicuna_v1.1"
"""`auto` uses the chat template of the checkpoint if it has one, otherwise the fallback."""


def _known_template(name: str, names: tuple[str, ...]) -> str:
    if name in names or name.endswith(".jinja"):
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name!r} is not one of {', '.join(names)}, or a .jinja file{hint}")


TemplateName = Annotated[str, AfterValidator(lambda name: _known_template(name, TEMPLATE_NAMES))]
"""The name of a built-in conversation format, or the path of a Jinja file."""
TemplateChoice = Annotated[str, AfterValidator(lambda name: _known_template(name, (AUTO, CHECKPOINT, *TEMPLATE_NAMES)))]


class Section(BaseModel):
    """Frozen and strict: an unknown key or a value of the wrong type is an error; it is never ignored or converted."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        use_attribute_docstrings=True,
    )


def expand_all_linear(value: Any) -> Any:
    listed = (value,) if value == ALL_LINEAR else value
    if not isinstance(listed, tuple):
        return value
    return tuple(name for item in listed for name in (PROJECTIONS if item == ALL_LINEAR else (item,)))


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    if isinstance(value, tuple) and all(isinstance(pair, tuple) for pair in value):
        return value
    raise ValueError("input should be a mapping, for example {up_proj: 4}")


NO_EXPRESSION = (re.error, RecursionError, OverflowError)
"""The exceptions that `re.compile` raises for an invalid pattern."""


def _are_expressions(pairs: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    for pattern, _ in pairs:
        try:
            re.compile(pattern)
        except NO_EXPRESSION as error:
            raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from None
    return pairs


def _in_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


Layers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), AfterValidator(_in_order)]
_Patterns = (BeforeValidator(_as_pairs), AfterValidator(_are_expressions), PlainSerializer(dict))
RankPattern = Annotated[tuple[tuple[str, PositiveInt], ...], *_Patterns]
AlphaPattern = Annotated[tuple[tuple[str, PositiveFloat], ...], *_Patterns]
"""A mapping in YAML, stored as pairs so that a config is hashable."""


def by_pattern(patterns: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """PEFT's rule: the value of the first pattern that matches the module's whole name or a dotted suffix of it."""
    matches = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matches, default)
