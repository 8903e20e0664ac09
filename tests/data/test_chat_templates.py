"""Chat templates of other models against transformers: ids and masks, token by token, and text that spells a marker."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from flacuna_jax.data.conversation import (
    Conversation,
    TemplateRefusal,
    Turn,
    named_template,
    render,
    render_text,
    template_from_jinja,
)
from flacuna_jax.data.tokenization import tokenize, tokenize_prompt, with_notes_on_marks
from flacuna_jax.errors import UserError
from flacuna_jax.generation.language_model import encode_prompt
from flacuna_jax.huggingface.chat_template import choose_template
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from tests.data.chat_templates import (
    BOS,
    EOS,
    SHIPPED,
    ZEPHYR_LIKE,
    marks_of,
    trl_templates,
    with_blocks,
    write_tokenizer,
)
from tests.data.rendered import (
    CALL,
    TOOL,
    Loaded,
    in_flacuna,
    in_transformers,
    messages_of,
    said,
    supervised_text,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fixed_date")

TRL = trl_templates()
if not TRL:
    pytest.skip("trl, whose templates are compared, is not installed", allow_module_level=True)
ALL = {**TRL, **SHIPPED}

CONVERSATIONS = {
    "single": Conversation("", "", said("What is the capital of France?", "Paris.")),
    "multi": Conversation("", "", said("Hi", "Hello!\nHow are you?", "Fine  ", "Good.", "Bye", "Bye!")),
    "system": Conversation("", "", said("Hi", "Hello!", "And?", "No."), system="Be brief."),
    "tool": Conversation(
        "",
        "",
        (
            Turn("user", "Weather?"),
            Turn("assistant", "", extra={"tool_calls": [CALL]}),
            Turn("tool", "sunny", extra={"name": "weather", "tool_call_id": "abcdefghi"}),
            Turn("assistant", "It is sunny."),
        ),
        tools=(TOOL,),
    ),
    "reasoning": Conversation(
        "",
        "",
        (
            Turn("user", "2+2?"),
            Turn("assistant", "4", extra={"reasoning_content": "Two and two."}),
            Turn("user", "3+3?"),
            Turn("assistant", "6", extra={"reasoning_content": "Add them."}),
        ),
    ),
}
IN_PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates of multimodal models, which read the content of a message as a list of parts."""
# The template's header ends in a newline and its answer begins with one: transformers encodes both as one token, which
# a generation prompt cannot end with. Training here encodes them separately, as generation does.
NEWLINES_MEET = ("qwen3_5_think", "qwen3_6", "qwen3_8")
UNCLEAR_WITHOUT_MARKS = ("gptoss",)
# The template writes a header before an answer that follows a tool's result, and its generation prompt does not.
CONTINUED_TURN = (("diffusion_gemma", "tool"),)


def _left_out(theirs: Any, source: str, conversation: Conversation, in_parts: bool) -> bool:
    """Whether transformers rejects the conversation too, or its text omits a part of the conversation."""
    try:
        ids, _ = in_transformers(theirs, source, conversation, in_parts)
    except Exception:
        return True
    text = theirs.decode(ids)
    wanted = [tool["function"]["description"] for tool in conversation.tools]
    wanted += [turn.text for turn in conversation.turns if turn.role == "tool"]
    calls = [call for turn in conversation.turns for call in dict(turn.extra or {}).get("tool_calls", ())]
    wanted += [city for call in calls for city in call["function"]["arguments"].values()]
    wanted += [dict(turn.extra or {}).get("reasoning_content", "") for turn in conversation.turns[-1:]]
    return any(word not in text for word in wanted)


def _generation_prompt(theirs: Any, source: str, in_parts: bool) -> str:
    """The generation prompt that transformers writes after a question."""
    messages = messages_of(Conversation("", "", said("question")), in_parts)
    text = theirs.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    return text.partition("question")[2]


def _runs(ids: list[int], chosen: list[bool]) -> list[list[int]]:
    """The selected ids, in contiguous runs."""
    grouped = itertools.groupby(zip(ids, chosen, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in pairs] for is_chosen, pairs in grouped if is_chosen]


@pytest.mark.parametrize("owned", [True, False], ids=["marks", "no-marks"])
@pytest.mark.parametrize("name", [*TRL, *SHIPPED])
def test_ids_and_masks_equal_those_of_transformers(name: str, owned: bool, loaded: Loaded) -> None:
    """Every template of trl, original and for training, and of published models, with every kind of conversation.

    The mask's reference is transformers' own with {% generation %} blocks: trl's training variant of a template, or the
    shipped text with blocks put in. A template without blocks must give the same mask, without what trl's variant marks
    and the model does not generate: the generation prompt, and white space after the last marker of an answer.
    """
    source = ALL[name]
    ours, theirs = loaded(*(marks_of(source) if owned else ()))
    template = template_from_jinja({"default": source}, name, ours.special)
    in_parts = name.removesuffix("_training") in IN_PARTS
    if name in UNCLEAR_WITHOUT_MARKS and not owned:
        assert template.untrainable is not None
        assert "generation" in template.untrainable
        return
    assert template.untrainable is None
    compared = 0
    for kind, conversation in CONVERSATIONS.items():
        try:
            ids, mask = in_flacuna(ours, template, conversation)
        except TemplateRefusal:
            assert kind != "single"
            assert _left_out(theirs, source, conversation, in_parts), kind
            continue
        compared += 1
        expected, _ = in_transformers(theirs, source, conversation, in_parts)
        if name in NEWLINES_MEET:
            assert theirs.decode(ids) == theirs.decode(expected)
            continue
        assert ids == expected, kind
        marked = with_blocks(name) if name in SHIPPED else TRL.get(f"{name.removesuffix('_training')}_training")
        if marked is None:
            continue
        marked_ids, reference = in_transformers(theirs, marked, conversation, in_parts)
        if marked_ids != expected:
            assert name not in SHIPPED, "the blocks that a test inserts change no text"
            continue
        if "endgeneration" in source:
            assert mask == reference, kind
        elif (name, kind) not in CONTINUED_TURN:
            more = [token for token, a, b in zip(ids, mask, reference, strict=True) if a and not b]
            assert not theirs.decode(more).strip(), kind
            header = _generation_prompt(theirs, source, in_parts)
            for run in _runs(ids, [not a and b for a, b in zip(mask, reference, strict=True)]):
                assert theirs.decode(run).strip() in header, kind
    assert compared >= 2


@pytest.mark.parametrize("pieces", ["spaces", "first space"])
@pytest.mark.parametrize("name", ["llama_2", "mistral_v0.3", "zephyr", "phi3", "gemma", "phi3_training"])
def test_tokenizers_that_add_a_leading_space(name: str, pieces: str, loaded: Loaded) -> None:
    """SentencePiece adds a space before every text, or only the first; markers that absorb a following space."""
    absorbing = [AddedToken(mark, rstrip=True, normalized=False) for mark in marks_of(ALL[name])]
    for marks in (marks_of(ALL[name]), absorbing):
        ours, theirs = loaded(*marks, pieces=pieces)
        template = template_from_jinja({"default": ALL[name]}, name, ours.special)
        for kind in ("single", "multi"):
            ids, _ = in_flacuna(ours, template, CONVERSATIONS[kind])
            assert ids == in_transformers(theirs, ALL[name], CONVERSATIONS[kind])[0], (kind, marks)


@pytest.mark.parametrize("pieces", ["bytes", "spaces", "first space"])
@pytest.mark.parametrize("puts_bos", [True, False])
def test_texts_without_a_template(pieces: str, puts_bos: bool, loaded: Loaded) -> None:
    """The text begins the sequence, although BOS is put before it: "first space" adds its space."""
    ours, theirs = loaded(pieces=pieces, puts_bos=puts_bos)
    for text in ("user says hello", " led by a space", "\nnext line", BOS):
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert list(encode_prompt(ours, text)) == ids
        record = Conversation("", "", (Turn("assistant", text),), raw=True)
        assert tokenize(record, named_template("vicuna_v1.1", ours.special), ours).ids.tolist() == [*ids, ours.eos_id]


nasty = st.text(max_size=8) | st.sampled_from(
    ["<|im_end|>", "<|eot_id|>", BOS, EOS, "[INST]", "<|im_<|im_end|>end|>", " "]
)


@given(texts=st.lists(nasty, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "mistral_v0.3", "phi3_training", "chatml"])
def test_no_message_text_becomes_a_special_token(name: str, loaded: Loaded, texts: list[str]) -> None:
    marks = ("<|im_start|>", "<|im_end|>") if name == "chatml" else tuple(marks_of(ALL[name]))
    ours, theirs = loaded(*marks)
    if name == "chatml":
        template = choose_template("chatml", Path("."), ours)
    else:
        template = template_from_jinja({"default": ALL[name]}, name, ours.special)
    text = "".join(texts)
    turns = said(f"x{text}x", f"y{text}y", f"x{text}", "yes")
    plain = tokenize(Conversation("", "", said("x", "y", "x", "yes")), template, ours)
    example = tokenize(Conversation("", "", turns), template, ours)
    special = np.array(sorted(ours.special.ids))
    assert (example.ids[np.isin(example.ids, special)] == plain.ids[np.isin(plain.ids, special)]).all()
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    rendered = theirs.apply_chat_template(messages, chat_template=template.jinja, tokenize=False)
    assert render_text(render(Conversation("", "", turns), template)) == rendered


def test_a_marker_in_a_message_is_encoded_as_transformers_sanitizes_it(loaded: Loaded) -> None:
    ours, theirs = loaded(*marks_of(ALL["qwen2_5"]))
    template = template_from_jinja({"default": ALL["qwen2_5"]}, "qwen2_5", ours.special)
    turns = said("before\n<|im_end|>\nafter", "<|im_start|>", "ok", "fine")
    expected = theirs.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns],
        chat_template=ALL["qwen2_5"],
        sanitize_control_tokens=True,
        return_dict=False,
    )
    found = tokenize(Conversation("", "", turns), template, ours).ids.tolist()
    assert theirs.decode(found) == theirs.decode(expected)
    special = ours.special.ids
    assert [token for token in found if token in special] == [token for token in expected if token in special]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma", "mistral_v0.3", "llama_2", "zephyr"])
def test_a_prompt_equals_the_text_before_the_answer_in_training(name: str, loaded: Loaded) -> None:
    ours, theirs = loaded(*marks_of(ALL[name]))
    template = template_from_jinja({"default": ALL[name]}, name, ours.special)
    for turns in (said("Hi"), said("Hi", "Hello!", "And?")):
        prompt = tokenize_prompt(turns, template, ours)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        theirs_ids = theirs.apply_chat_template(
            messages, chat_template=ALL[name], add_generation_prompt=True, return_dict=False
        )
        assert prompt == list(theirs_ids)
        example = tokenize(Conversation("", "", (*turns, Turn("assistant", "Yes."))), template, ours)
        assert example.ids[: len(prompt)].tolist() == prompt
        assert not example.loss_mask[: len(prompt)].all()
        assert example.loss_mask[len(prompt)] or name == "zephyr"  # its prompt lacks the newline before an answer


def test_answers_end_at_the_marker_of_the_template(loaded: Loaded) -> None:
    for name, end in {"qwen2_5": "<|im_end|>", "llama3_1": "<|eot_id|>", "phi3": "<|end|>", "llama_2": EOS}.items():
        ours, _ = loaded(*marks_of(ALL[name]))
        template = template_from_jinja({"default": ALL[name]}, name, ours.special)
        assert [ours.special.spellings[token] for token in template.ends] == [end]
        assert template.stop_strings == ()
    without, _ = loaded()
    template = template_from_jinja({"default": ALL["qwen2_5"]}, "qwen2_5", without.special)
    assert (template.ends, template.stop_strings) == ((), ("<|im_end|>",))


def test_missing_marker_tokens_are_reported(loaded: Loaded) -> None:
    ours, _ = loaded()
    template = with_notes_on_marks(choose_template("chatml", Path("."), ours), ours)
    assert any("no token <|im_start|>" in note and "'<'" in note for note in template.notes)
    owning, _ = loaded("<|im_start|>", "<|im_end|>")
    assert choose_template("chatml", Path("."), owning).notes == ()


def test_a_template_for_single_turns_can_be_used_for_them(loaded: Loaded) -> None:
    source = "{% if messages | length > 2 %}{{ raise_exception('single') }}{% endif %}{{ messages[0].content }}"
    ours, _ = loaded()
    template = with_notes_on_marks(template_from_jinja({"default": source}, "single", ours.special), ours)
    assert tokenize_prompt((Turn("user", "one"),), template, ours)


def test_chatml_with_its_markers_as_tokens_ends_without_eos(loaded: Loaded) -> None:
    ours, theirs = loaded("<|im_start|>", "<|im_end|>")
    template = choose_template("chatml", Path("."), ours)
    example = tokenize(CONVERSATIONS["multi"], template, ours)
    text = theirs.decode(example.ids[example.loss_mask])
    assert text == "Hello!\nHow are you?<|im_end|>Good.<|im_end|>Bye!<|im_end|>"
    assert ours.eos_id not in example.ids


def test_a_tokenizer_without_bos(loaded: Loaded) -> None:
    ours, theirs = loaded("<|im_start|>", "<|im_end|>", bos=None)
    assert (ours.bos_id, ours.prefix_ids) == (None, ())
    for name in ("vicuna_v1.1", "chatml", "plain", "alpaca", "llama-2-chat"):
        template = choose_template(name, Path("."), ours)
        turns = said("Hi", "Yes")
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        expected = theirs.apply_chat_template(messages, chat_template=template.jinja, return_dict=False)
        assert tokenize(Conversation("", "", turns), template, ours).ids.tolist() == list(expected)


def test_turns_can_be_excluded_from_the_loss(loaded: Loaded) -> None:
    for name in ("qwen2_5_training", "qwen3", "llama3_1", "mistral_v0.3"):
        ours, theirs = loaded(*marks_of(ALL[name]))
        template = template_from_jinja({"default": ALL[name]}, name, ours.special)
        turns = (
            Turn("user", "a"),
            Turn("assistant", "skip", trained=False),
            Turn("user", "b"),
            Turn("assistant", "keep"),
        )
        example = tokenize(Conversation("", "", turns), template, ours)
        text = theirs.decode(example.ids[example.loss_mask])
        assert "keep" in text
        assert "skip" not in text
        everything = tokenize(Conversation("", "", turns), template, ours, "all")
        assert "skip" not in theirs.decode(everything.ids[everything.loss_mask])
        assert everything.loss_mask.sum() > example.loss_mask.sum()
        last = tokenize(CONVERSATIONS["multi"], template, ours, "last")
        assert "Bye!" in theirs.decode(last.ids[last.loss_mask])
        assert "Good." not in theirs.decode(last.ids[last.loss_mask])


def test_unsupported_content_is_rejected_or_written_as_text(loaded: Loaded) -> None:
    ours, theirs = loaded()
    strict = choose_template("vicuna_v1.1", Path("."), ours)
    for kind, message in {"tool": "list of tools", "reasoning": "reasoning_content"}.items():
        with pytest.raises(TemplateRefusal, match=message):
            tokenize(CONVERSATIONS[kind], strict, ours)
    lenient = choose_template("vicuna_v1.1", Path("."), ours, tools_as_text=True)
    example = tokenize(CONVERSATIONS["tool"], lenient, ours)
    text = theirs.decode(example.ids)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in text
    assert "<tool_response>sunny</tool_response>" in text
    assert '"description": "Tells the weather"' in text
    supervised = theirs.decode(example.ids[example.loss_mask])
    assert "weather" in supervised
    assert "sunny</tool" not in supervised
    with pytest.raises(TemplateRefusal, match="alternating turns"):
        tokenize(Conversation("", "", (Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c"))), strict, ours)


def test_variables_are_passed_to_the_template(loaded: Loaded) -> None:
    ours, theirs = loaded(*marks_of(ALL["qwen3"]))
    template = template_from_jinja({"default": ALL["qwen3"]}, "q", ours.special, variables={"enable_thinking": False})
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        chat_template=ALL["qwen3"],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert tokenize_prompt(said("Hi"), template, ours) == list(expected)


def test_a_checkpoints_own_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "m", ["<|im_start|>", "<|im_end|>"])
    ours = load_tokenizer(directory)
    assert choose_template("auto", directory, ours).name == "vicuna_v1.1"
    with pytest.raises(UserError, match="has no chat template"):
        choose_template("checkpoint", directory, ours)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for chat_template in (
        ZEPHYR_LIKE,
        [{"name": "tool_use", "template": "{{ 'T' }}"}, {"name": "default", "template": ZEPHYR_LIKE}],
    ):
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}))
        template = choose_template("auto", directory, ours)
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        expected = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
        assert tokenize_prompt(said("Hi"), template, ours)[: len(expected)] == list(expected)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(ZEPHYR_LIKE)
    assert choose_template("auto", directory, ours).jinja == ZEPHYR_LIKE
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": ZEPHYR_LIKE}))
    assert choose_template("auto", directory, ours).jinja == ZEPHYR_LIKE


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gptoss", "deepseekv3"])
def test_a_message_with_only_white_space_is_kept(name: str, loaded: Loaded) -> None:
    ours, theirs = loaded(*marks_of(ALL[name]))
    template = template_from_jinja({"default": ALL[name]}, name, ours.special)
    conversation = Conversation("", "", said("a", "ok", " ", "yes"))
    assert in_flacuna(ours, template, conversation)[0] == in_transformers(theirs, ALL[name], conversation)[0]
    assert "yes" in supervised_text(template, conversation.turns)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "gptoss", "deepseekv3", "llama_2"])
def test_long_conversations_carry_the_same_loss_as_short_ones(name: str, loaded: Loaded) -> None:
    """A long conversation is rendered a few times, not once per message; its answers carry the same loss."""
    ours, _ = loaded(*marks_of(ALL[name]))
    template = template_from_jinja({"default": ALL[name]}, name, ours.special)
    texts = [
        text for number in range(10) for text in (f"q{number}" + " " * (number % 2), f"a{number}\n" * (number % 3 + 1))
    ]
    long = render(Conversation("", "", said(*texts)), template)
    runs: dict[int, str] = {}
    for segment in long:
        if segment.supervised:
            runs[segment.turn] = runs.get(segment.turn, "") + segment.text
    assert list(runs) == list(range(1, 20, 2))
    for turn in range(3, 20, 4):
        following = ("q",) if turn < 19 else ()  # some templates close the last answer differently
        pair = supervised_text(template, said("q", "a", *texts[turn - 1 : turn + 1], *following))
        assert pair.endswith(runs[turn])
    whole = render_text(render(Conversation("", "", said(*texts[:-1])), template))
    assert render_text(long).startswith(whole.rpartition(texts[-2].strip())[0])
