"""Templates: their text, their rules for joining segments, and their jinja against Hugging Face's own renderer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flacuna_jax.data.conversation import (
    TEMPLATES,
    Conversation,
    Segment,
    Template,
    Turn,
    join_segments,
    render,
    render_prompt,
    render_text,
)
from tests.data import fastchat

V1_1 = TEMPLATES["vicuna_v1.1"]

SAID = [
    ("Hello!",),
    ("Hello!", "Hi!"),
    ("Hello!", "Hi!", "How are you?"),
    ("a\n", " b ", "  c", "d\n\n"),
    ("", "b"),
    ("a", "", "c", "d"),
    ("", "b", ""),
    ("it's {{ 1 }} {% if %} 'x' \"y\" \\n", "ok {# no #}"),
]


def turns(*texts: str) -> tuple[Turn, ...]:
    roles = ("user", "assistant")
    return tuple(Turn(roles[index % 2], text) for index, text in enumerate(texts))


@pytest.mark.parametrize("said", [said for said in SAID if len(said) % 2 == 0])
def test_v1_1_is_fastchats_text(said: tuple[str, ...]) -> None:
    expected = fastchat.prompt([(("USER", "ASSISTANT")[i % 2], text) for i, text in enumerate(said)])
    assert render_text(render(Conversation("x", "y", turns(*said)), V1_1), bos="") == expected


def test_prompts_end_with_the_colon() -> None:
    text = render_text(render_prompt(turns("Hello!", "Hi!", "How are you?"), V1_1))
    assert text == f"<s>{V1_1.system} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    v0 = render_text(render_prompt(turns("Hello!"), TEMPLATES["vicuna_v0"], system="Be brief."))
    assert v0 == "<s>Be brief.\n\n### Human: Hello!\n### Assistant:"


@pytest.mark.parametrize("said", [(), ("a", "b")])
def test_a_prompt_ends_with_a_question(said: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="ends with a user"):
        render_prompt(turns(*said), V1_1)


@pytest.fixture(scope="module")
def hugging_face(story_llama: Path) -> Callable[..., str]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(story_llama / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )

    def apply(template: Template, messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template.jinja,
            tokenize=False,
            add_generation_prompt=messages[-1]["role"] == "user",
        )

    return apply


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("said", SAID)
def test_jinja_gives_the_same_text(
    hugging_face: Callable[..., str], template: Template, system: str | None, said: tuple[str, ...]
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn.role, "content": turn.text} for turn in turns(*said)]
    text = render_text(render(Conversation("x", "y", turns(*said), system), template))
    assert hugging_face(template, messages) == text


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_jinja_refuses_turns_that_do_not_alternate(hugging_face: Callable[..., str], template: Template) -> None:
    with pytest.raises(Exception, match="alternate"):
        hugging_face(template, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def text(content: str, supervised: bool = False) -> Segment:
    return Segment("text", content, supervised, 0)


def test_segments_join_where_they_cannot_be_split() -> None:
    joined = join_segments(iter([text("a"), text("b"), text(" c"), text("d "), text(" e"), text("")]))
    assert [segment.text for segment in joined] == ["ab", " cd  e"]


def test_a_template_that_splits_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="inside a word"):
        join_segments(iter([text("ans"), text("wer", supervised=True)]))
