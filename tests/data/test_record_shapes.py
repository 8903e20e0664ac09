"""A table of record shapes: what is read, what carries loss, what is counted, what is rejected.

A conversation is written as `role: text` with ` | ` between turns; ` +` after a turn marks that it carries loss.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.formats import LEADING_ANSWER, NO_ANSWER, UNANSWERED, read_source
from flacuna_jax.data.messages import ARGUMENTS_DECODED, CALLS_WRAPPED, RESULTS_ENCODED
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.errors import UserError


class Shape(NamedTuple):
    """`read` is "" for a dropped record; `counted` lists its counts in the report: ignored, changed, dropped."""

    record: Any
    read: str = ""
    counted: tuple[str, ...] = ()
    refused: str = ""
    format: str = "auto"
    extra: tuple[dict[str, Any] | None, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()


def say(*pairs: tuple[str, Any], **beside: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in pairs], **beside}


def chat(*pairs: tuple[str, Any], **beside: Any) -> dict[str, Any]:
    return {"messages": [{"role": who, "content": what} for who, what in pairs], **beside}


Q, A = ("user", "q"), ("assistant", "a")
HQ, GA = ("human", "q"), ("gpt", "a")
ONE = "user: q | assistant: a +"
TWO = "user: q | assistant: a + | user: q2 | assistant: a2 +"


def answered(**keys: Any) -> dict[str, Any]:
    """Two answers, the first of which has `keys`."""
    first = {"role": "assistant", "content": "a", **keys}
    return {"messages": [*chat(Q)["messages"], first, *chat(("user", "q2"), ("assistant", "a2"))["messages"]]}


FUNCTION = {"name": "weather", "arguments": {"city": "Rome"}}
CALL = {"type": "function", "function": FUNCTION}
CALL_AS_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = "user: q | assistant:  + | tool: sunny | assistant: a +"


def calling(**call: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", **call},
            *chat(("tool", "sunny"), A)["messages"],
        ]
    }


SHAPES: dict[str, Shape] = {
    # Lists of messages.
    "sharegpt": Shape(say(HQ, GA), ONE),
    "messages": Shape(chat(Q, A), ONE),
    "conversations of role and content": Shape({"conversations": chat(Q, A)["messages"]}, ONE),
    "messages of from and value": Shape({"messages": say(HQ, GA)["conversations"]}, ONE),
    "conversation, as in lmsys-chat": Shape({"conversation": chat(Q, A)["messages"]}, ONE),
    "conversations as JSON text": Shape({"conversations": json.dumps(say(HQ, GA)["conversations"])}, ONE),
    "messages as JSON text": Shape({"messages": json.dumps(chat(Q, A)["messages"])}, ONE),
    "roles in capitals": Shape(say(("Human", "q"), ("GPT", "a")), ONE),
    "bot": Shape(say(HQ, ("bot", "a")), ONE),
    "chatgpt": Shape(say(("user", "q"), ("chatgpt", "a")), ONE),
    "model": Shape(say(("user", "q"), ("model", "a")), ONE),
    "text in parts": Shape(chat(("user", [{"type": "text", "text": "q"}]), A), ONE),
    "leading system message": Shape(chat(("system", "s"), Q, A), f"system = s | {ONE}"),
    "later system message": Shape(chat(Q, A, ("system", "s"), Q, A), f"{ONE} | system: s | {ONE}"),
    "empty system": Shape(chat(("system", ""), Q, A), ONE),
    "developer": Shape(chat(("developer", "s"), Q, A), f"developer: s | {ONE}"),
    "system in a separate field": Shape(say(HQ, GA, system="s"), f"system = s | {ONE}"),
    "the same system twice": Shape(chat(("system", "s"), Q, A, system="s"), f"system = s | {ONE}"),
    "two system texts": Shape(chat(("system", "s"), Q, A, system="t"), refused="two different system texts"),
    "several turns of one role": Shape(chat(Q, Q, A, A), "user: q | user: q | assistant: a + | assistant: a +"),
    "a message with an id": Shape(
        {"messages": [{"role": "user", "content": "q", "id": 1}, {"role": "assistant", "content": "a"}]},
        ONE,
        ("ignored messages[].id",),
    ),
    "a leading answer": Shape(say(("gpt", "hello"), HQ, GA), ONE, (f"changed {LEADING_ANSWER}",)),
    "a trailing question": Shape(say(HQ, GA, HQ), ONE, (f"changed {UNANSWERED}",)),
    "a trailing empty answer": Shape(say(HQ, GA, HQ, ("gpt", "")), ONE, (f"changed {UNANSWERED}",)),
    "no answer": Shape(say(HQ), counted=(f"dropped {NO_ANSWER}",)),
    "white space as an answer": Shape(say(HQ, ("gpt", " \n")), counted=(f"dropped {NO_ANSWER}",)),
    "an unknown role": Shape(say(("narrator", "x"), GA), refused="turn 1 has unknown from 'narrator'"),
    "no role": Shape({"messages": [{"content": "q"}]}, refused="turn 1 has neither `role` nor `from`"),
    "no text": Shape(
        {"messages": [{"role": "user", "msg": "q"}]}, refused="has no text; put it in .*its fields: role, msg"
    ),
    "a number as text": Shape(chat(("user", 3), A), refused="'content' of turn 1 must be text, not a number"),
    "a picture in parts": Shape(
        chat(("user", [{"type": "image_url", "image_url": "x"}]), A), refused="its part 1 is of type 'image_url'"
    ),
    "a list that is Python's repr": Shape(
        {"messages": "[{'role': 'user', 'content': 'q'}]"}, refused="not JSON; it looks like a Python repr"
    ),
    # Loss per turn.
    "weight 0": Shape(answered(weight=0), TWO.replace("a +", "a", 1)),
    "weight 0.0": Shape(answered(weight=0.0), TWO.replace("a +", "a", 1)),
    "weight 1": Shape(answered(weight=1), TWO),
    "weight null": Shape(answered(weight=None), TWO),
    "weight 0.5": Shape(answered(weight=0.5), refused="'weight' of turn 2 is 0.5; it must be 0 or 1"),
    "train false": Shape(answered(train=False), TWO.replace("a +", "a", 1)),
    "train true": Shape(answered(train=True), TWO),
    "training false": Shape(answered(training=False), TWO.replace("a +", "a", 1)),
    "loss false": Shape(answered(loss=False), TWO.replace("a +", "a", 1)),
    "loss null": Shape(answered(loss=None), TWO),
    "train as text": Shape(answered(train="no"), refused="'train' of turn 2 is 'no'; it must be true or false"),
    "weight contradicts train": Shape(answered(weight=1, train=False), refused="turn 2 has weight 1 and train false"),
    "weight 0 on a user message": Shape(
        {"messages": [{"role": "user", "content": "q", "weight": 0}, {"role": "assistant", "content": "a"}]}, ONE
    ),
    "train true on a user message": Shape(
        {"messages": [{"role": "user", "content": "q", "train": True}, {"role": "assistant", "content": "a"}]},
        ONE,
        ("ignored messages[].train of the user",),
    ),
    # Tools and reasoning.
    "tool calls": Shape(
        calling(content=None, tool_calls=[CALL]), ASKED, extra=(None, {"tool_calls": [CALL]}, None, None)
    ),
    "tool calls with text": Shape(
        calling(content="wait", tool_calls=[CALL]),
        ASKED.replace("assistant:  +", "assistant: wait +"),
        extra=(None, {"tool_calls": [CALL]}, None, None),
    ),
    "arguments as JSON text": Shape(
        calling(tool_calls=[CALL_AS_TEXT]),
        ASKED,
        (f"changed {ARGUMENTS_DECODED}",),
        extra=(None, {"tool_calls": [CALL]}, None, None),
    ),
    "a bare call": Shape(
        calling(content="", tool_calls=[FUNCTION]),
        ASKED,
        (f"changed {CALLS_WRAPPED}",),
        extra=(None, {"tool_calls": [CALL]}, None, None),
    ),
    "OpenAI's older function_call": Shape(
        calling(content=None, function_call=FUNCTION),
        ASKED,
        (f"changed {CALLS_WRAPPED}",),
        extra=(None, {"tool_calls": [CALL]}, None, None),
    ),
    "function_call and observation, as in LLaMA-Factory": Shape(
        say(HQ, ("function_call", json.dumps(FUNCTION)), ("observation", "sunny"), GA),
        ASKED,
        (f"changed {CALLS_WRAPPED}",),
        extra=(None, {"tool_calls": [CALL]}, None, None),
    ),
    "a call that is not JSON": Shape(
        say(HQ, ("function_call", "weather(Rome)"), GA), refused="turn 2 is a function call, whose text is the text"
    ),
    "a call without a name": Shape(calling(tool_calls=[{"arguments": {}}]), refused="has no function name"),
    "a result that is an object": Shape(
        {"messages": [*calling(tool_calls=[CALL])["messages"][:2], *chat(("tool", {"t": 20}), A)["messages"]]},
        ASKED.replace("sunny", '{"t": 20}'),
        (f"changed {RESULTS_ENCODED}",),
    ),
    "the name and id of a result": Shape(
        {
            "messages": [
                *calling(tool_calls=[CALL])["messages"][:2],
                {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "1"},
                {"role": "assistant", "content": "a"},
            ]
        },
        ASKED,
        extra=(None, {"tool_calls": [CALL]}, {"tool_call_id": "1", "name": "weather"}, None),
    ),
    "tools": Shape(chat(Q, A, tools=[TOOL]), ONE, tools=(TOOL,)),
    "tools as JSON text": Shape(chat(Q, A, tools=json.dumps([TOOL])), ONE, tools=(TOOL,)),
    "no tools": Shape(chat(Q, A, tools="[]"), ONE),
    "bare tools": Shape(
        say(HQ, GA, tools=json.dumps([TOOL["function"]])), ONE, (f"changed {CALLS_WRAPPED}",), tools=(TOOL,)
    ),
    "invalid tools": Shape(chat(Q, A, tools="weather"), refused="'tools' is the text 'weather', which is not JSON"),
    "reasoning_content": Shape(
        chat(Q) | {"messages": [*chat(Q)["messages"], {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
        ONE,
        extra=(None, {"reasoning_content": "r"}),
    ),
    "thinking": Shape(
        {"messages": [*chat(Q)["messages"], {"role": "assistant", "content": "a", "thinking": "r"}]},
        ONE,
        extra=(None, {"thinking": "r"}),
    ),
    "reasoning that is a list": Shape(
        {"messages": [*chat(Q)["messages"], {"role": "assistant", "content": "a", "thinking": ["r"]}]},
        refused="'thinking' of turn 2 must be text, not a list",
    ),
    # A question and an answer.
    "alpaca": Shape({"instruction": "q", "input": "", "output": "a"}, ONE),
    "alpaca with input": Shape({"instruction": "q ", "input": " x", "output": "a"}, "user: q\nx | assistant: a +"),
    "alpaca with history": Shape({"instruction": "q2", "output": "a2", "history": [["q", "a"]]}, TWO),
    "alpaca with an empty history": Shape({"instruction": "q", "output": "a", "history": []}, ONE),
    "alpaca with an invalid history": Shape(
        {"instruction": "q", "output": "a", "history": ["q"]}, refused="'history' must be a list of pairs"
    ),
    "alpaca with system": Shape({"instruction": "q", "output": "a", "system": "s"}, f"system = s | {ONE}"),
    "alpaca with its rendered text": Shape(
        {"instruction": "q", "output": "a", "text": "Below is ..."}, ONE, ("ignored text",)
    ),
    "dolly": Shape(
        {"instruction": "q", "context": "x", "response": "a", "category": "open_qa"},
        "user: q\nx | assistant: a +",
        ("ignored category",),
    ),
    "prompt and completion": Shape({"prompt": "q", "completion": "a"}, ONE),
    "prompt and completion of messages": Shape(
        {
            "prompt": chat(("system", "s"), Q, A, ("user", "q2"))["messages"],
            "completion": chat(("assistant", "a2"))["messages"],
        },
        "system = s | user: q | assistant: a | user: q2 | assistant: a2 +",
    ),
    "a prompt of messages": Shape({"prompt": chat(Q)["messages"], "completion": "a"}, ONE),
    "prompt and response": Shape({"prompt": "q", "response": "a"}, ONE),
    "question and answer": Shape({"question": "q", "answer": "a"}, ONE),
    "system_prompt, question, response, as OpenOrca": Shape(
        {"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, f"system = s | {ONE}"
    ),
    "query and response with history, as ms-swift": Shape(
        {"query": "q2", "response": "a2", "history": [["q", "a"]]}, TWO
    ),
    "input and output": Shape({"input": "q", "output": "a"}, ONE),
    "messages and a prompt that is their first question": Shape(chat(Q, A, prompt="q"), ONE, ("ignored prompt",)),
    "metadata": Shape(
        {"instruction": "q", "output": "a", "split": "x", "score": 3, "empty": None, "none": ""},
        ONE,
        ("ignored score", "ignored split"),
    ),
    "a number as the answer": Shape({"question": "q", "answer": 42}, refused="'answer' must be text, not a number"),
    # Text.
    "text alone": Shape({"text": "x"}, refused="only `text`; set format: text in its source to train on it"),
    "text with format: text": Shape({"text": "x", "url": "u"}, "raw: x +", ("ignored url",), format="text"),
    "empty text": Shape({"text": " "}, counted=(f"dropped {NO_ANSWER}",), format="text"),
    # Rejected kinds of records.
    "chosen and rejected": Shape(
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        refused="a pair of a chosen and a rejected answer, which is for",
    ),
    "chosen and rejected in another format": Shape(
        {"prompt": "q", "completion": "a", "rejected": "b"},
        refused="chosen and rejected answers, which this format does not read; set format: preference",
        format="prompt_completion",
    ),
    "a label with a completion": Shape(
        {"prompt": "q", "completion": "a", "label": False}, refused="labelled good or bad, which is for .*name: kto"
    ),
    "kto_tag": Shape(chat(Q, A, kto_tag=True), refused="labelled good or bad, which is for"),
    "kto_tag in another format": Shape(
        chat(Q, A, kto_tag=True), refused="kto_tag, which says whether the answer is good", format="messages"
    ),
    "pictures": Shape(
        say(("human", "<image>q"), GA, images=["x.png"]), refused="has 'images'; training supports text only"
    ),
    "a picture with a placeholder": Shape(
        say(("human", "<image>q"), GA, image="x.png"), refused="has 'image'; training"
    ),
    "no pictures": Shape(say(HQ, GA, images=[]), ONE),
    "a picture placeholder without a picture": Shape(say(("human", "<image>q"), GA), ONE.replace("q", "<image>q")),
    "other fields": Shape({"title": "t", "body": "b"}, refused="no known format .its fields: title, body; known are"),
    "not an object": Shape(3, refused="a record must be an object, not a number"),
    "half a surrogate": Shape(chat(("user", "\ud800"), A), refused="half a surrogate pair"),
    "a record of another format": Shape(
        chat(Q, A),
        refused=r"'instruction' must be text, and is missing \(its fields are those of format: messages\)",
        format="alpaca",
    ),
}


def written(conversation: Conversation) -> str:
    turns = [f"{turn.role}: {turn.text}{' +' if carries_loss(turn) else ''}" for turn in conversation.turns]
    if conversation.raw:
        return f"raw: {conversation.turns[0].text} +"
    return " | ".join(([f"system = {conversation.system}"] if conversation.system is not None else []) + turns)


def carries_loss(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.trained


def counted(report: SourceReport) -> tuple[str, ...]:
    counters = (("ignored", report.ignored), ("changed", report.changed), ("dropped", report.dropped))
    return tuple(f"{what} {name}" for what, counter in counters for name in sorted(counter.elements()))


def read(path: Path, kind: str, mode: str) -> tuple[list[Conversation], SourceReport]:
    report = SourceReport(str(path))
    found = read_source(SourceConfig(path=str(path), format=kind), BadRecordPolicy(report, mode))
    return [conversation for _, conversation in found], report


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_record_shapes(tmp_path: Path, shape: Shape) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(shape.record) + "\n")
    if shape.refused:
        with pytest.raises(UserError, match=shape.refused) as error:
            read(path, shape.format, "error")
        assert str(error.value).startswith(f"{path}, line 1 (record 1): ")
        conversations, report = read(path, shape.format, "skip")
        assert (conversations, report.read, report.dropped.total()) == ([], 1, 1)
        return
    conversations, report = read(path, shape.format, "error")
    assert " || ".join(map(written, conversations)) == shape.read
    assert counted(report) == shape.counted
    assert report.read == 1
    if shape.extra is not None:
        assert tuple(turn.extra for turn in conversations[0].turns) == shape.extra
    if conversations:
        assert conversations[0].tools == shape.tools


def test_the_table_has_at_least_sixty_shapes() -> None:
    assert len(SHAPES) >= 60
