import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.flan_mini.html_to_markdown import html_to_markdown, is_html
from flacuna_jax.flan_mini.sharegpt import CUT_ENDS, MADE_MARKDOWN, CleaningError, clean, split
from tests.flan_mini.sources import chat

PAGE = """<div class="markdown prose w-full break-words light"><p>Use <code>map</code>, <strong>not</strong> a
loop:</p><pre><div class="bg-black"><div class="flex"><span>python</span><button class="flex">Copy code</button></div>
<div class="p-4"><code class="!whitespace-pre hljs language-python"><span class="hljs-keyword">def</span> f(x):
    <span class="hljs-keyword">return</span> x &lt; 1
</code></div></div></pre><ol><li><p>First</p></li><li>Second<ul><li>nested</li><li>twice</li></ul></li></ol>
<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>x | y</td></tr></tbody></table>
<p>See <a href="https://example.org">this</a>.</p></div>"""


def test_a_rendered_answer_becomes_its_original_markdown() -> None:
    assert html_to_markdown(PAGE) == (
        "Use `map`, **not** a loop:\n\n```python\ndef f(x):\n    return x < 1\n```\n\n1. First\n2. Second\n"
        "   - nested\n   - twice\n\n| a | b |\n| --- | --- |\n| 1 | x \\| y |\n\nSee [this](https://example.org)."
    )


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>a</p><p>b</p>", "a\n\nb"),
        ("<h2>T</h2><p>a<br>b</p>", "## T\n\na\nb"),
        ("<blockquote><p>a</p><p>b</p></blockquote>", "> a\n>\n> b"),
        ("<pre>plain\n  text</pre>", "```\nplain\n  text\n```"),
        ("<pre><code>a ``` b</code></pre>", "````\na ``` b\n````"),
        ("<ol start='3'><li>c</li></ol>", "3. c"),
        ("<p>1 &lt; 2 &amp; <em>x</em></p>", "1 < 2 & *x*"),
        ("<div><p>unclosed <b>bold", "unclosed **bold**"),
        ("</li></td></ul><p>stray</p>", "stray"),
        ("<p>a<script>evil()</script>b</p>", "ab"),
        ("<pre><code>one\n\n\n\nfour</code></pre>", "```\none\n\n\n\nfour\n```"),
    ],
)
def test_elements(html: str, markdown: str) -> None:
    assert html_to_markdown(html) == markdown


def test_only_rendered_answers_count_as_html() -> None:
    assert is_html(PAGE)
    assert not is_html("Use <p>text</p> for a paragraph.")
    assert not is_html("<html> is the outermost element")
    assert not is_html("a < b and c > d")


@given(st.text(st.sampled_from(list("<>/apredivolutb \n\"'=&;#x![-?")), max_size=60))
def test_no_html_breaks_the_converter(html: str) -> None:
    with contextlib.suppress(ValueError):
        html_to_markdown(f"<div>{html}</div>")


def test_clean_keeps_users_markup_and_converts_answers_to_markdown() -> None:
    conversation, changes = clean(chat("x", "<p>what is this?</p>", "<p>A paragraph.</p>"))
    assert [turn.text for turn in conversation.turns] == ["<p>what is this?</p>", "A paragraph."]
    assert changes == [MADE_MARKDOWN]


def test_ends_are_cut_to_pairs() -> None:
    conversation, changes = clean(chat("x", "hello", "q", "a", "q2", first="gpt"))
    assert [turn.text for turn in conversation.turns] == ["q", "a"]
    assert changes == [CUT_ENDS]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat("x", "q"), "no more than one turn"),
        (chat("x"), "no more than one turn"),
        (chat("x", "a", first="gpt"), "no more than one turn"),
        (chat("x", "q", "I run on OpenAI's servers."), "mentions OpenAI or ChatGPT"),
        (chat("x", "Are you ChatGPT?", "No."), "mentions OpenAI or ChatGPT"),
        (chat("x", "q", "I'm sorry, but I cannot help with that."), "refusal"),
        (chat("x", "q", "As an AI language model, I have no opinion."), "refusal"),
        (chat("x", "q", "<p>  </p>"), "empty turn"),
        (chat("x", "q", "<div><![xa</div>"), "unreadable HTML"),
        (chat("x", "q", "<div>" * 2000 + "a</div>"), "unreadable HTML"),
        (
            {"conversations": [{"from": "human", "value": "a"}] * 2 + [{"from": "gpt", "value": "b"}]},
            "broken role order",
        ),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "unknown role"),
    ],
)
def test_removed_conversations(record: object, reason: str) -> None:
    with pytest.raises(CleaningError) as raised:
        clean(record)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    "answer", ["Sorry for the delay. Here it is.", "I cannot stress enough how good it is.", "Sure."]
)
def test_ordinary_answers_do_not_count_as_refusals(answer: str) -> None:
    clean(chat("x", "q", answer))


@pytest.mark.parametrize(
    "record", [3, {"id": "x"}, {"conversations": [3]}, {"conversations": [{"from": "human", "value": 1}]}]
)
def test_a_record_that_is_not_a_conversation_is_a_bad_record(record: object) -> None:
    with pytest.raises(BadRecord):
        clean(record)


def count(turns: Sequence[Turn]) -> int:
    return 10 + sum(len(turn.text) + 3 for turn in turns)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12), st.integers(20, 120))
def test_splitting_loses_no_turn(sizes: list[tuple[int, int]], limit: int) -> None:
    turns = [
        Turn(role, f"{index:03d}".ljust(size, "x"))
        for index, pair in enumerate(sizes)
        for role, size in zip(("user", "assistant"), pair, strict=True)
    ]
    whole = Conversation("c", "sharegpt", tuple(turns))
    parts, lost = split(whole, limit, count)
    assert all(count(part.turns) <= limit for part in parts)
    assert all([turn.role for turn in part.turns] == ["user", "assistant"] * (len(part.turns) // 2) for part in parts)
    kept = [turn for part in parts for turn in part.turns]
    fitting = [t for i in range(0, len(turns), 2) if count(turns[i : i + 2]) <= limit for t in turns[i : i + 2]]
    if count(turns) <= limit:
        assert parts == [whole]
    else:
        assert kept == fitting
        assert lost == (len(turns) - len(fitting)) // 2
        assert len({part.id for part in parts}) == len(parts)
        for part in parts:
            start = int(part.id.removeprefix("c_"))
            assert turns[start : start + len(part.turns)] == list(part.turns)
