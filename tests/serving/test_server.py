"""The server over HTTP: the `openai` client, lm-evaluation-harness, `flacuna check`, the judge, and wrong requests."""

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from flacuna_jax.evaluation.cache import Store
from flacuna_jax.evaluation.judge import ServerJudge
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.generation.language_model import GenerationRequest
from flacuna_jax.generation.settings import Decoding
from flacuna_jax.inference import ModelAddress, ModelLoader
from flacuna_jax.verbs.check import Server as CheckedServer
from tests.serving.models import ADAPTERS, make_adapter, make_adapters, prepared
from tests.serving.serving import Running, running

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def directory(story_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    make_adapters(directory, story_llama)
    make_adapter(directory / "spare", story_llama, ADAPTERS["small"], seed=5)
    return directory


@pytest.fixture(scope="module")
def server(story_llama: Path, directory: Path) -> Iterator[Running]:
    adapters = {name: directory / name for name in ADAPTERS}
    options = ["--rows", "4", "--context", "300", "--waiting", "20", "--adapters-below", str(directory)]
    with running(*prepared(story_llama, adapters, *options)) as found:
        yield found


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            text = reply.read().decode()
            return reply.status, json.loads(text) if text.startswith("{") else text
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)


def test_the_openai_client_streams_what_it_gets_whole(client: Any, server: Running, story_llama: Path) -> None:
    assert [model.id for model in client.models.list()] == ["base", "small", "large"]
    asked = {"model": "base", "messages": [{"role": "user", "content": STORY}], "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    model = ChatModel(
        ModelLoader("float32").load(ModelAddress(story_llama)), server.scheduler.models.offered["base"].template
    )
    (expected,) = model.generate([STORY], Decoding(max_new_tokens=12))
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, "length")
    assert answer.usage.completion_tokens == expected.tokens == len(choice.logprobs.content)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in choice.logprobs.content)
    assert "".join(one.token for one in choice.logprobs.content).strip() == expected.text.strip()
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage == answer.usage or chunks[-1].usage.total_tokens == answer.usage.total_tokens
    again = client.chat.completions.create(**{**asked, "temperature": 1.0}, seed=3, n=2)
    same = client.chat.completions.create(**{**asked, "temperature": 1.0}, seed=3, n=2)
    assert [one.message.content for one in again.choices] == [one.message.content for one in same.choices]
    assert again.choices[0].message.content != again.choices[1].message.content


def test_streams_have_the_scores_of_every_piece(client: Any) -> None:
    """The scores of all pieces are those of the whole answer, and they come with the text of their tokens."""
    chat = {"model": "base", "messages": [{"role": "user", "content": STORY}], "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**chat, logprobs=True, stream=True)]
    scored = [piece for piece in pieces if piece.logprobs]
    assert len(scored) > 2
    found = [one for piece in scored for one in piece.logprobs.content]
    assert [one.token for one in found] == [one.token for one in whole]
    # float32; the programs of both have the same sizes or larger ones.
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in whole], abs=1e-4)
    asked = {"model": "base", "prompt": STORY, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    expected = client.completions.create(**asked).choices[0]
    streamed = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in streamed) == expected.text
    assert [token for piece in streamed for token in piece.logprobs.tokens] == expected.logprobs.tokens
    offsets = [offset for piece in streamed for offset in piece.logprobs.text_offset]
    assert offsets == expected.logprobs.text_offset


def test_prompts_as_lists_and_token_ids(client: Any, server: Running) -> None:
    tokenizer = server.scheduler.models.first.tokenizer
    ids = [[*tokenizer.prefix_ids, *tokenizer.encode(text)] for text in (STORY, "One day")]
    asked = {"model": "base", "max_tokens": 6, "temperature": 0}
    texts, tokens = (client.completions.create(prompt=prompt, **asked) for prompt in ([STORY, "One day"], ids))
    single = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in (STORY, ids[1])]
    assert [one.text for one in texts.choices] == [one.text for one in tokens.choices] == single
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_completions_echo_stop_and_pick_adapters(client: Any) -> None:
    asked = {"prompt": STORY, "max_tokens": 10, "temperature": 0}
    texts = {name: client.completions.create(model=name, **asked).choices[0].text for name in ("base", *ADAPTERS)}
    assert len(set(texts.values())) == 3
    echoed = client.completions.create(model="base", echo=True, logprobs=1, **asked).choices[0]
    assert echoed.text == STORY + texts["base"]
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == len(echoed.logprobs.top_logprobs) == len(echoed.logprobs.text_offset)
    stopped = client.completions.create(model="base", stop=[texts["base"][6:9]], **asked).choices[0]
    assert (stopped.text, stopped.finish_reason) == (texts["base"][:6], "stop")
    pieces = client.completions.create(model="base", stream=True, **asked)
    assert "".join(piece.choices[0].text for piece in pieces) == texts["base"]


WRONG = [
    (b"{", "the body is not JSON", 400),
    (b"[" * 100000, "the body is not JSON", 400),
    ([], "body", 400),
    ({"model": "base"}, "prompt", 400),
    ({"model": "base", "prompt": "x", "max_tokn": 3}, "max_tokn: is not a field", 400),
    ({"model": "base", "prompt": "x", "presence_penalty": 0.5}, "presence_penalty is not implemented", 400),
    ({"model": "base", "prompt": "x", "temperature": -1}, "temperature", 400),
    ({"model": "base", "prompt": "x", "temperature": 1e-9}, "temperature", 400),
    ({"model": "base", "prompt": "x", "top_p": 0}, "top_p", 400),
    ({"model": "base", "prompt": "x", "stop": ""}, "stop", 400),
    ({"model": "base", "prompt": [5000000]}, "outside of the vocabulary", 400),
    ({"model": "base", "prompt": [1, 5], "max_tokens": 9000}, "exceeds the 300 tokens", 400),
    ({"model": "base", "prompt": "\ud800"}, "UTF-8", 400),
    ({"model": "other", "prompt": "x"}, "no model is named 'other'", 404),
    ({"model": "base", "prompt": ["x"] * 21, "max_tokens": 1}, "asks for 21 answers", 400),
    (b"[" + b" " * (5 << 20), "larger than this server accepts", 413),
]


@pytest.mark.parametrize(("body", "message", "status"), WRONG)
def test_wrong_requests_are_clear_errors(server: Running, body: Any, message: str, status: int) -> None:
    found, answer = post(f"{server.url}v1/completions", body)
    assert found == status
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format is not implemented"),
    ],
)
def test_wrong_chats_are_clear_errors(server: Running, change: dict[str, Any], message: str) -> None:
    asked = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    status, answer = post(f"{server.url}v1/chat/completions", asked | change)
    assert status == 400
    assert message in answer["error"]["message"]


def test_other_hosts_and_plain_forms_are_refused(server: Running) -> None:
    """A website cannot use a server on its visitor's machine, by a name of its own or by a form."""
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    as_json = {"Content-Type": "application/json"}
    assert post(f"{server.url}v1/completions", body, {**as_json, "Host": "evil.example"})[0] == 403
    assert post(f"{server.url}v1/completions", body, {"Content-Type": "text/plain"})[0] == 400


def test_adapters_are_loaded_below_the_directory_only(server: Running, directory: Path, tmp_path: Path) -> None:
    def load(name: str, path: str) -> tuple[int, Any]:
        return post(f"{server.url}v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    for path in ("..", "/etc", str(tmp_path), "missing", "a\0b", "x" * 5000):
        status, answer = load("other", path)
        assert (status, "not a directory below" in answer["error"]["message"]) == (400, True)
    assert "has no adapter_config.json" in load("other", ".")[1]["error"]["message"]
    assert load("spare", "spare")[0] == 200
    assert "is loaded" in load("spare", "spare")[1]["error"]["message"]
    asked = {"prompt": STORY, "max_tokens": 10, "temperature": 0}
    assert post(f"{server.url}v1/completions", {"model": "spare", **asked})[0] == 200
    assert post(f"{server.url}v1/unload_lora_adapter", {"lora_name": "spare"})[0] == 200
    assert post(f"{server.url}v1/completions", {"model": "spare", **asked})[0] == 404
    assert post(f"{server.url}v1/unload_lora_adapter", {"lora_name": "base"})[0] == 400


def test_clients_that_go_away_free_their_rows(server: Running) -> None:
    body = json.dumps({"model": "base", "prompt": STORY, "max_tokens": 280, "stream": True, "temperature": 0}).encode()
    fields = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*fields, f"Content-Length: {len(body)}", "", ""])
    host, port = server.url.removeprefix("http://").rstrip("/").split(":")
    for _ in range(8):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
    status, answer = post(f"{server.url}v1/completions", {"model": "base", "prompt": STORY, "max_tokens": 2})
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 2
    for _ in range(600):
        if server.scheduler.busy == server.scheduler.waiting == 0:
            break
        asyncio.run(asyncio.sleep(0.1))
    assert (server.scheduler.busy, server.scheduler.waiting) == (0, 0)


def test_check_and_judge_talk_to_it(server: Running, story_llama: Path, tmp_path: Path) -> None:
    checked = CheckedServer(server.url, None)
    model = ModelLoader("float32").load(ModelAddress(story_llama))
    prompt = (1, *model.tokenizer.encode(STORY))
    assert checked.name == "base"
    assert checked.complete(list(prompt), 10) == model.generate([GenerationRequest(prompt, 10)])[0].text
    assert checked.tokens(STORY) == [*model.tokenizer.prefix_ids, *model.tokenizer.encode(STORY)]
    judge = ServerJudge(f"{server.url}v1", "small", Store(tmp_path / "transcript.jsonl"), max_tokens=8)
    assert len(judge.review(["Is it good?"] * 3)) == 3


def test_numbers_for_prometheus(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.url}metrics") as reply:
        found = {family.name: family for family in text_string_to_metric_families(reply.read().decode())}
    assert found["flacuna_busy_rows"].samples[0].value == 0
    assert found["flacuna_new_tokens"].samples[0].value > 0
