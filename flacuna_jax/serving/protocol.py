"""Requests in OpenAI's form. Every field is used, or refused by name, except those in `IGNORED`.

Source: the parameters of the `openai` client, `openai/types/completion_create_params.py` and
`openai/types/chat/completion_create_params.py`; `top_k` as in vLLM.
"""

import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from flacuna_jax.errors import UserError
from flacuna_jax.generation.settings import LOWEST_TEMPERATURE

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer of this server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
}
"""Fields that are not implemented, and the values with which they ask for nothing."""

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, StringConstraints(min_length=1)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Fields):
    """What both kinds of requests have in common."""

    model: str
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """-1 and 0 keep every token, as in vLLM."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def only_known_fields(cls, value: Any) -> Any:
        """Removes ignored fields and those that ask for nothing."""
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, given in value.items():
            if name in IGNORED or given is None:
                continue
            if name in NEUTRAL and name not in cls.model_fields:
                if given not in NEUTRAL[name]:
                    raise UserError(f"{name} is not implemented by this server (found {str(given)[:60]!r})")
                continue
            kept[name] = given
        return kept

    @model_validator(mode="after")
    def possible_temperature(self) -> "Asked":
        if self.temperature and self.temperature < LOWEST_TEMPERATURE:
            raise UserError(f"temperature is {self.temperature}; use 0, or a number >= {LOWEST_TEMPERATURE}")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def own_seed(self) -> int:
        """The seed, or a random one."""
        return secrets.randbits(32) if self.seed is None else self.seed

    @property
    def reports_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Asked):
    """/v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class ChatRequest(Asked):
    """/v1/chat/completions. The messages and tools are read as those of training data are."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def fields_fit_together(self) -> "ChatRequest":
        if self.tool_choice not in (None, *NEUTRAL["tool_choice"]):
            raise UserError(f"tool_choice {self.tool_choice!r} is not implemented; use auto or none")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise UserError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class LoadAdapter(Fields):
    """/v1/load_lora_adapter, as in vLLM."""

    lora_name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[\w.:/-]+$")]
    lora_path: Text


class UnloadAdapter(Fields):
    """/v1/unload_lora_adapter, as in vLLM."""

    lora_name: str


class TokenizeRequest(Fields):
    """/tokenize, in the form of vLLM (prompt) or of llama.cpp (content)."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = True
    add_special: bool = True


def parsed(kind: type[Model], value: Any) -> Model:
    """Raises UserError that names the first wrong field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        what = "is not a field of this request" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{where or 'body'}: {what}") from None
