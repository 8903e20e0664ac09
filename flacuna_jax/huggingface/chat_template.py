"""The chat template of a checkpoint, and the choice of a run's template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.types import AUTO, CHECKPOINT, FALLBACK
from flacuna_jax.data.conversation import Template, named_template, template_from_jinja
from flacuna_jax.data.jinja_template import read_jinja_file
from flacuna_jax.data.tokenization import Tokenizer, with_notes_on_marks
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.huggingface.tokenizer_settings import CONFIG

JINJA, JSON = "chat_template.jinja", "chat_template.json"
ADDITIONAL = "additional_chat_templates"


class ChatTemplate(NamedTuple):
    """The chat template of a checkpoint.

    Attributes:
      path: The file that contains it.
      sources: Jinja by name: "default", and others such as "tool_use".
    """

    path: Path
    sources: Mapping[str, str]


def read_chat_template(directory: str | Path) -> ChatTemplate | None:
    """The template of a checkpoint or tokenizer directory, from the files that transformers reads; None if it has none.

    Raises UserError for a template that is neither text nor a list of named texts, or has no default.
    """
    directory = local_checkpoint(directory, weights=False)
    if (directory / JINJA).is_file():
        named = {path.stem: read_jinja_file(path) for path in sorted((directory / ADDITIONAL).glob("*.jinja"))}
        return ChatTemplate(directory / JINJA, {"default": read_jinja_file(directory / JINJA), **named})
    for file in (JSON, CONFIG):
        path = directory / file
        value = read_json(path).get("chat_template") if path.is_file() else None
        if value is not None:
            return ChatTemplate(path, _by_name(value, path))
    return None


def _by_name(value: Any, path: Path) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": text} for name, text in value.items()]
    entries = value if isinstance(value, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    named = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if len(named) < len(entries) or "default" not in named:
        raise UserError(
            f"{path}: chat_template must be a text, or a list of named texts, one of which is named default"
        )
    return named


def resolve_name(name: str, directory: str | Path) -> str:
    """Resolves `auto` for a checkpoint or tokenizer directory; returns other names unchanged."""
    if name != AUTO:
        return name
    return FALLBACK if read_chat_template(directory) is None else CHECKPOINT


def describe_choice(asked: str, directory: str | Path) -> str:
    """A line that names the template in use and the reason."""
    found = read_chat_template(directory)
    if resolve_name(asked, directory) == CHECKPOINT and found is not None:
        return f"the checkpoint's own ({found.path})"
    return asked if asked != AUTO else f"{FALLBACK}, since {directory} has no chat template"


def open_template(data: DataConfig, directory: str | Path, tokenizer: Tokenizer) -> Template:
    """The template in the settings of a run, bound to the special tokens of its tokenizer.

    Args:
      data: Settings, of which `template`, `template_variables` and `tools_as_text` are used.
      directory: Directory of the tokenizer, which contains the checkpoint's template.
      tokenizer: The tokenizer of that directory.

    Raises:
      UserError: The template does not exist, or it cannot be used for training.
    """
    template = choose_template(
        data.template, directory, tokenizer, tools_as_text=data.tools_as_text, variables=data.template_variables
    )
    if template.untrainable is not None:
        raise UserError(f"data.template: {template.untrainable}")
    return template


def load_template(directory: str | Path, name: str = AUTO, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a checkpoint, or a named one, with the special tokens of the checkpoint's tokenizer.

    Args:
      directory: of the tokenizer.
      name: of a template, a .jinja file, "checkpoint", or "auto": the checkpoint's own if it has one, else vicuna_v1.1.
      tokenizer: that of the directory, if it is loaded already.

    Raises:
      UserError: there is no such template.
    """
    return choose_template(name, directory, tokenizer or load_tokenizer(directory))


def choose_template(
    name: str,
    directory: str | Path,
    tokenizer: Tokenizer,
    *,
    tools_as_text: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> Template:
    """Like `open_template`, for a name that is not from the settings of a run."""
    resolved = resolve_name(name, directory)
    if resolved != CHECKPOINT:
        template = named_template(resolved, tokenizer.special, tools_as_text=tools_as_text, variables=variables)
        return with_notes_on_marks(template, tokenizer)
    found = read_chat_template(directory)
    if found is None:
        raise UserError(f"data.template: {directory} has no chat template ({JINJA}, or chat_template in {CONFIG})")
    template = template_from_jinja(
        found.sources, str(found.path), tokenizer.special, tools_as_text=tools_as_text, variables=variables
    )
    return with_notes_on_marks(template, tokenizer)
