"""Chat templates of published models, for comparison with transformers, and tokenizers with their markers as tokens.

The texts are those of the checkpoints they are named after: Llama 2 Chat, Mistral 7B Instruct v0.1 and v0.3, Zephyr 7B.
More templates are read from the installed trl package.
"""

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + _ALTERNATE
    + "{% if loop.index0 == 0"
    " and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' +"
    " message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V0_1 = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_V0_3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with an optional system message first!") }}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
ZEPHYR_LIKE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIPPED = {"llama_2": LLAMA_2, "mistral_v0.1": MISTRAL_V0_1, "mistral_v0.3": MISTRAL_V0_3, "zephyr": ZEPHYR}

_MARKED = {
    "llama_2": [
        (
            "{{ ' '  + content.strip() + ' ' + eos_token }}",
            "{% generation %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endgeneration %}",
        )
    ],
    "mistral_v0.1": [
        (
            "{{ message['content'] + eos_token + ' ' }}",
            "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ ' ' }}",
        )
    ],
    "mistral_v0.3": [
        (
            '{{- " " + message["content"]|trim + eos_token }}',
            '{%- generation %}{{- " " + message["content"]|trim + eos_token }}{%- endgeneration %}',
        ),
        ('{{- "[TOOL_CALLS] [" }}', '{%- generation %}{{- "[TOOL_CALLS] [" }}'),
        (
            '{%- elif message["role"] == "assistant" %}',
            '{%- endgeneration %}{%- elif message["role"] == "assistant" %}',
        ),
    ],
    "zephyr": [
        (
            "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n",
            "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}",
        )
    ],
}


def with_blocks(name: str) -> str:
    """A published template with {% generation %} around the assistant's text; the rendered text is the same."""
    source = SHIPPED[name]
    for written, marked in _MARKED[name]:
        assert written in source
        source = source.replace(written, marked)
    return source


def trl_templates() -> dict[str, str]:
    """The templates of the installed trl package by name; {} if it is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return {}
    directory = Path(found.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.jinja"))}


BOS, EOS = "<|BOS|>", "<|EOS|>"
_MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_\w+>|\[/?[A-Z]{3,}(?:_[A-Z]+)*\]|<\|?turn\|?>|</s>"
)
# How Llama 3, Qwen and GPT-4 split text into words.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_CORPUS = ["hello world what is the capital of France? The answer is Paris. assistant user system\n\n"] * 20


def marks_of(source: str) -> list[str]:
    return [mark for mark in dict.fromkeys(_MARK.findall(source)) if mark not in (BOS, EOS)]


def write_tokenizer(
    directory: Path,
    marks: Sequence[AddedToken | str],
    *,
    pieces: str = "bytes",
    bos: str | None = BOS,
    settings: dict[str, object] | None = None,
    puts_bos: bool = False,
) -> Path:
    """A tokenizer.json and its settings.

    Args:
      marks: Special tokens in addition to BOS and EOS.
      pieces: "bytes" (Llama 3, Qwen), "spaces" (LLaMA's, with a space before every text) or "first space" (before the
        first text alone).
      bos: None writes a tokenizer without BOS.
      settings: Additional keys of tokenizer_config.json.
      puts_bos: Whether the post-processor adds BOS.
    """
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=pieces != "bytes", unk_token=None))
    if pieces == "bytes":
        words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        scheme = "always" if pieces == "spaces" else "first"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(32, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_CORPUS, trainer)
    special = [mark for mark in (bos, EOS) if mark is not None]
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in special])
    made.add_special_tokens([AddedToken(m, normalized=False) if isinstance(m, str) else m for m in marks])
    made.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    if puts_bos and bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": EOS, **(settings or {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
