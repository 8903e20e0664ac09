"""Model cards: the README.md of exported models, with their origin and evaluation results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.hub import is_repository_name


@dataclass(frozen=True)
class Measured:
    """One formatted result of an evaluation; `problems` is None if their number is not recorded."""

    benchmark: str
    score: str
    value: str
    problems: int | None


@dataclass(frozen=True)
class Facts:
    """The content of a card: lines by label, in order, and evaluation results."""

    rows: Mapping[str, str] = field(default_factory=dict)
    results: Sequence[Measured] = ()


def adapter_card(lora: LoraConfig, base_name: str | None, base_revision: str | None, facts: Facts) -> str:
    """README.md of an adapter: what it is, its origin, and how to load it."""
    base = base_name or "the base model"
    described_base = base + (f", revision {base_revision}" if base_revision else "")
    revision = f", revision={json.dumps(base_revision)}" if base_revision else ""
    rows = {"base model": described_base, "DoRA" if lora.use_dora else "LoRA": described(lora)} | dict(facts.rows)
    usage = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_place(base)}{revision})",
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
    ]
    return _card("LoRA adapter", ["library_name: peft", "tags: [lora, flacuna]"], base_name, rows, facts.results, usage)


def model_card(
    lora: LoraConfig | None,
    base_name: str | None,
    facts: Facts,
    logit_shift: float | None,
    gguf_file: str | None = None,
) -> str:
    """README.md of a whole model. `gguf_file` is its GGUF file; None for a model in Hugging Face's form."""
    rows = {"base model": base_name or "none, trained from scratch"}
    if lora is not None:
        rows["DoRA, merged" if lora.use_dora else "LoRA, merged"] = described(lora)
    if logit_shift is not None:
        rows["rounding of the merged weights"] = f"shifts logits by at most {logit_shift:.1e} on probe tokens"
    place = '"path/to/this/directory"' + (f", gguf_file={json.dumps(gguf_file)}" if gguf_file else "")
    usage = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({place})",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
    ]
    library = "gguf" if gguf_file else "transformers"
    kind = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [flacuna]"]
    return _card("Language model", kind, base_name, rows | dict(facts.rows), facts.results, usage)


def _card(
    title: str,
    kind: Sequence[str],
    base_name: str | None,
    rows: Mapping[str, str],
    results: Sequence[Measured],
    usage: Sequence[str],
) -> str:
    # The Hub refuses a card whose base_model is a path.
    base = [f"base_model: {json.dumps(base_name)}"] if base_name and is_repository_name(base_name) else []
    head = ["---", *kind, *base, "---"]
    lines = [*head, "", f"# {title}", "", "Made with flacuna_jax.", "", *(f"- {k}: {v}" for k, v in rows.items()), ""]
    if results:
        lines += ["| benchmark | score | value | problems |", "|---|---|---|---|"]
        lines += [
            f"| {r.benchmark} | {r.score} | {r.value} | {'' if r.problems is None else f'{r.problems:,}'} |"
            for r in results
        ]
        lines += [""]
    return "\n".join([*lines, "```python", *usage, "```", ""])


def _place(base: str) -> str:
    """The arguments with which transformers opens a base, which may be a GGUF file."""
    path = PurePath(base)
    if path.suffix != ".gguf":
        return json.dumps(base)
    return f"{json.dumps(str(path.parent))}, gguf_file={json.dumps(path.name)}"


def described(lora: LoraConfig) -> str:
    """Settings of an adapter on one line."""
    text = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
    if lora.layers_to_transform is not None:
        text += f" of layers {', '.join(map(str, lora.layers_to_transform))}"
    for name, pattern in (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)):
        text += "".join(f"; {name} {value:g} in {module}" for module, value in pattern)
    return text + ("; rank-stabilised" if lora.use_rslora else "")
