"""The formats other than Vicuna's: golden ids and masks with the real tokenizer, and custom templates."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.files import load_config
from flacuna_jax.config.types import TEMPLATE_NAMES
from flacuna_jax.data.build import build_store
from flacuna_jax.data.conversation import NAMES, Conversation, Turn, render, render_prompt, render_text
from flacuna_jax.data.tokenization import Tokenizer, tokenize, tokenize_prompt
from flacuna_jax.errors import UserError
from tests.data.conftest import Characters, SentencePiece
from tests.vocabularies import llama_template

SAID = ("Hello, who are you?", "I am <b>me</b>.\nA second line.", "And </s> you?", "You.")


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))


def test_the_config_knows_the_templates() -> None:
    assert NAMES == TEMPLATE_NAMES


def test_llama_2_ids_equal_those_of_meta(llama: SentencePiece) -> None:
    """Each exchange is BOS, the ids of "[INST] {user} [/INST] {answer} " in one piece, EOS."""
    example = tokenize(Conversation("", "", turns(*SAID)), llama_template("llama-2-chat"), llama)
    expected: list[int] = []
    for user, answer in (SAID[:2], SAID[2:]):
        expected += [1, *llama.encode(f"[INST] {user} [/INST] {answer} "), 2]
    assert example.ids.tolist() == expected


@pytest.mark.parametrize("name", ["chatml", "alpaca", "plain"])
def test_ids_between_special_tokens_equal_those_of_the_whole_text(llama: SentencePiece, name: str) -> None:
    segments = render(Conversation("", "", turns(*SAID)), llama_template(name))
    example = tokenize(Conversation("", "", turns(*SAID)), llama_template(name), llama)
    expected: list[int] = []
    text = ""
    for segment in segments:
        if segment.token is None:
            text += segment.text
            continue
        expected += llama.encode(text) if text else []
        expected.append(segment.token)
        text = ""
    assert example.ids.tolist() == expected + (llama.encode(text) if text else [])


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_answers_and_their_ends_carry_loss(llama: SentencePiece, name: str) -> None:
    example = tokenize(Conversation("", "", turns(*SAID)), llama_template(name), llama)
    spans: list[str] = []
    starts = np.flatnonzero(np.diff(np.concatenate(([0], example.loss_mask.astype(int)))) == 1)
    ends = np.flatnonzero(np.diff(np.concatenate((example.loss_mask.astype(int), [0]))) == -1)
    for start, end in zip(starts, ends, strict=True):
        ids = example.ids[start : end + 1].tolist()
        spans.append(llama.decode([token for token in ids if token not in (1, 2)]).strip())
    marks = {"chatml": "<|im_end|>", "vicuna_v0": "\n###"}.get(name, "")
    last = "" if name == "vicuna_v0" else marks
    assert spans == [SAID[1] + marks, SAID[3] + last]
    assert example.ids[-1] == 2
    assert example.loss_mask[-1]


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_prompt_equals_the_text_before_the_answer_in_training(llama: SentencePiece, name: str) -> None:
    prompt = tokenize_prompt(turns(*SAID[:3]), llama_template(name), llama)
    example = tokenize(Conversation("", "", turns(*SAID)), llama_template(name), llama)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.loss_mask[len(prompt) :].all()


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=2, max_size=6))
def test_texts_survive_every_template(texts: list[str]) -> None:
    said = texts if len(texts) % 2 == 0 else texts[:-1]
    for name in TEMPLATE_NAMES:
        text = render_text(render(Conversation("", "", turns(*said)), llama_template(name)))
        position = 0
        for part in said:
            part = part.strip() if name == "llama-2-chat" else part
            position = text.index(part, position) + len(part)


PREFIX = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<u>
{{ message.content }}
<a>
{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
MARKED = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}Q: {{ message.content }}
{% else %}A:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}A:{% endif %}"""

SPACED = """{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}[assistant] {% endif %}"""
SPACED_MARKED = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
USER: {{ message.content }} {% else %}\
ASSISTANT: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT: {% endif %}"""


def write(directory: Path, text: str) -> str:
    path = directory / "mine.jinja"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("source", "text"), [
    (PREFIX, "<s><u>\nHi\n<a>\nYo</s><u>\n</s>\n<a>\nOk</s>"),
    (MARKED, "<s>Q: Hi\nA: Yo</s>Q: </s>\nA: Ok</s>"),
    (SPACED, "<s>[user] Hi\n[assistant] Yo\n</s>[user] </s>\n[assistant] Ok\n</s>"),
    (SPACED_MARKED, "<s>USER: Hi ASSISTANT: Yo</s>USER: </s> ASSISTANT: Ok</s>"),
])  # fmt: skip
def test_a_custom_template(tmp_path: Path, llama: SentencePiece, source: str, text: str) -> None:
    template = llama_template(write(tmp_path, source))
    conversation = Conversation("", "", turns("Hi", "Yo", "</s>", "Ok"))
    segments = render(conversation, template)
    assert render_text(segments) == text
    supervised = render_text([segment for segment in segments if segment.supervised])
    assert supervised.replace(" ", "").replace("\n", "") == "Yo</s>Ok</s>"
    example = tokenize(conversation, template, llama)
    assert (example.ids == 2).sum() == 2  # the user's "</s>" is text
    last = tokenize(conversation, template, llama, "last")
    assert llama.decode(last.ids[last.loss_mask].tolist()).strip() == "Ok"
    prompt = tokenize_prompt(conversation.turns[:3], template, llama)
    assert example.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("source", [SPACED, SPACED_MARKED])
def test_a_space_before_an_answer_belongs_to_its_first_token(tmp_path: Path, llama: SentencePiece, source: str) -> None:
    template = llama_template(write(tmp_path, source))
    example = tokenize(Conversation("", "", turns("Hi", "Yes")), template, llama)
    assert example.ids[example.loss_mask][0] == llama.model.piece_to_id("▁Yes")
    open_prompt = render_text(render_prompt(turns("Hi"), template))
    assert open_prompt.endswith((":", "]"))


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_our_jinja_gives_the_same_ids(tmp_path: Path, name: str, llama: SentencePiece) -> None:
    """An exported template, read back as a file, gives the same ids as the template that it was exported from."""
    path = tmp_path / f"{name}.jinja"
    path.write_text(llama_template(name).jinja)
    conversation = Conversation("", "", turns(*SAID))
    ours, theirs = (
        tokenize(conversation, llama_template(name), llama),
        tokenize(conversation, llama_template(str(path)), llama),
    )
    assert np.array_equal(ours.ids, theirs.ids)
    assert np.array_equal(ours.loss_mask, theirs.loss_mask)


@pytest.mark.parametrize(("source", "message"), [
    ("{% for message in messages %}", r"mine\.jinja:1: not a Jinja template"),
    ("{{ 1 / 0 }}", "the template rejects the conversation: ZeroDivisionError"),
    ("{{ messages[0].content.__class__.__mro__ }}", "the template rejects the conversation"),
    ("{{ raise_exception('no') }}", "the template rejects the conversation: no"),
    ("nothing", "answers cannot be separated from prompts"),
    ("{{ messages | length }} {{ messages[-1].content }}", "omits the assistant's text in turn 2"),
    ("{% generation %}{{ (messages + messages)[1].content }}{% endgeneration %}", "several {% generation %} blocks"),
])  # fmt: skip
def test_messages_for_invalid_templates(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raise UserError(str(llama_template(write(tmp_path, source)).untrainable))


def test_a_missing_file_and_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        llama_template(str(tmp_path / "none.jinja"))
    config = "output_dir: x\nmodel: {path: y}\ndata: {sources: [{path: z}], template: llama2-chat}\n"
    (tmp_path / "c.yaml").write_text(config)
    with pytest.raises(UserError, match=r"data\.template: 'llama2-chat' is not one of .* did you mean 'llama-2-chat'"):
        load_config(tmp_path / "c.yaml")


def test_a_config_may_name_a_template_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    tokenizer: Tokenizer = Characters()
    config = DataConfig(sources=(SourceConfig(path=str(tmp_path / "a.jsonl")),), template=write(tmp_path, PREFIX))
    store, _ = build_store(config, tokenizer)
    assert tokenizer.decode(store.example(0).ids.tolist()) == "<u>\np\n<a>\nc"
