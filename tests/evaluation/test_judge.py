"""The judge with a local server that fails in various ways."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.cache import Store
from flacuna_jax.evaluation.impact import (
    WritingPrompt,
    asks_for_code,
    contains_code,
    judge_prompt,
    last_digit,
    load,
    stated_score,
)
from flacuna_jax.evaluation.judge import FILTERED, ModelJudge, ServerJudge
from tests.evaluation.models import Scripted
from tests.vocabularies import llama_template


class _Server(ThreadingHTTPServer):
    answers: list[tuple[int, dict[str, str], Any]]
    """Status, headers and body of the next answers; later answers are "3". A body of bytes is sent as it is, after
    `status` seconds."""
    requests: list[dict[str, Any]]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        said = {"choices": [{"message": {"content": "3"}, "finish_reason": "stop"}]}
        status, headers, answer = self.server.answers.pop(0) if self.server.answers else (200, {}, said)
        if isinstance(answer, bytes):
            time.sleep(status)
            self.wfile.write(answer)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.answers, server.requests = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _judge(server: _Server, path: Path | None = None, **settings: Any) -> tuple[ServerJudge, list[float]]:
    waited: list[float] = []
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    return ServerJudge(url, "judge-1", Store(path), sleep=waited.append, parallel=1, **settings), waited


def test_request_follows_the_protocol(server: _Server) -> None:
    judge, _ = _judge(server, key="secret")
    assert judge.review(["How good?"]) == ["3"]
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["key"] == "Bearer secret"
    assert request["temperature"] == 0
    assert request["messages"] == [{"role": "user", "content": "How good?"}]


def test_retries_wait_longer_each_time_and_obey_retry_after(server: _Server) -> None:
    judge, waited = _judge(server)
    empty = {"choices": [{"message": {"content": ""}}]}
    server.answers = [(500, {}, {}), (429, {"Retry-After": "7"}, {}), (200, {}, empty), (200, {}, {"odd": 1})]
    assert judge.review(["x"]) == ["3"]
    assert waited == [1, 7, 4, 8]


def test_invalid_http_invalid_json_and_broken_connections_are_retried(server: _Server) -> None:
    judge, waited = _judge(server)
    server.answers = [
        (0, {}, b"what?\r\n\r\n"),
        (0, {}, b"HTTP/1.0 200 OK\r\nContent-Length: 500\r\n\r\n{"),
        (0, {}, b"HTTP/1.0 200 OK\r\n\r\n\xff<html>"),
        (529, {"Retry-After": "-1"}, {}),
    ]
    assert judge.review(["x"]) == ["3"]
    assert waited == [1, 2, 4, 0]


def test_requests_to_a_hanging_server_are_retried(server: _Server) -> None:
    judge, waited = _judge(server, timeout=0.3)
    server.answers = [(1, {}, b"")]
    assert judge.review(["x"]) == ["3"]
    assert waited == [1]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://h/v1", "http://", "judge"])
def test_an_invalid_url_is_an_error_before_any_request(url: str) -> None:
    with pytest.raises(UserError, match="expected the base of the API"):
        ServerJudge(url, "judge-1", Store(None))


def test_a_filtered_review_counts_as_an_answer(server: _Server) -> None:
    judge, _ = _judge(server)
    server.answers = [
        (200, {}, {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}),
        (400, {}, {"error": {"code": "content_filter"}}),
    ]
    assert judge.review(["x", "y"]) == [FILTERED, FILTERED]
    assert last_digit(FILTERED) == 1


def test_rejected_requests_and_exhausted_retries_are_errors(server: _Server) -> None:
    judge, waited = _judge(server, retries=2)
    server.answers = [(401, {}, {"error": "bad key"})]
    with pytest.raises(UserError, match=r"rejects it \(HTTP 401\).*bad key"):
        judge.review(["x"])
    server.answers = [(503, {}, {})] * 3
    with pytest.raises(UserError, match="gave HTTP 503, 3 times"):
        judge.review(["x"])
    assert waited == [1, 2]


def test_transcript_is_kept_and_used_as_a_cache(server: _Server, tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    judge, _ = _judge(server, path)
    judge.review(["one", "two"])
    judge.store.close()
    entries = [json.loads(line)["value"] for line in path.read_text().splitlines()]
    assert [entry["request"]["messages"][0]["content"] for entry in entries] == ["one", "two"]
    again, _ = _judge(server, path)
    assert again.review(["two", "one", "three"]) == ["3", "3", "3"]
    assert len(server.requests) == 3


def test_a_model_of_this_package_can_judge() -> None:
    model = Scripted(answer=lambda prompt: "4")
    assert ModelJudge(model, llama_template("vicuna_v1.1")).review(["How good?"]) == ["4"]
    assert model.asked[0].endswith("USER: How good? ASSISTANT:")
    with pytest.raises(UserError, match="the judge scripted has a context of 100 tokens"):
        ModelJudge(Scripted(context_length=100), llama_template("vicuna_v1.1")).review(["How good?"])


@pytest.mark.parametrize(
    ("review", "faithful", "corrected"),
    [
        ("4", 4, 4),
        ("4 out of 5", 5, 4),
        ("On a scale between 1 and 5 I choose 3.", 3, 3),
        ("Rating: 2/5", 5, 2),
        ("3. Satisfactory: ... (option 3 of 7)", 1, 3),
        ("no idea", 1, None),
        ("10", 1, None),
        ("I give it 4.5", 5, None),
    ],
)
def test_reviews_are_read_in_both_readings(review: str, faithful: int, corrected: int | None) -> None:
    assert last_digit(review) == faithful
    assert stated_score(review) == corrected


def test_judge_prompts() -> None:
    relevance = judge_prompt("relevance", "T", "P")
    assert relevance.startswith("Text: T\n        \n        Prompt: P\n        \n        How relevant is the text")
    assert "arguments. \n        5. Excellent" in relevance
    coherence = judge_prompt("coherence", "T {prompt}", "P")
    assert "P" not in coherence.replace("Proficient", "").replace("{prompt}", "")
    assert coherence.endswith("reading experience.\n        ")


def test_prompts_are_read_in_both_file_formats(test_data: Path, tmp_path: Path) -> None:
    (tmp_path / "impact").mkdir()
    line = {"Category": "Creative", "Definition": "You write.", "Prompt": "A poem."}
    (tmp_path / "impact" / "data.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = load(tmp_path)
    assert prompt == WritingPrompt("0", "creative", "You write.", "A poem.")
    assert prompt.question("raw") == "You write. A poem."
    assert prompt.question("output") == "You write.\n\nA poem.\nOutput:"
    assert len(load(test_data)) == 80


def test_code_is_distinguished_from_prose() -> None:
    assert contains_code("Sure:\n```\nx\n```")
    assert contains_code("def f(x):\n    return x")
    assert contains_code("#include <stdio.h>\nint main() {}")
    assert not contains_code("If it rains, we return home.\nWhile waiting: read. The class of 1990; import duties.")
    assert asks_for_code("Write a Python function")
    assert not asks_for_code("Write a poem about the sea")
