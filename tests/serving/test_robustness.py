"""Many requests of all kinds at once: every answer is a correct one or a clear error, memory stays, rows become free.

The normal set has a short version with a server in this process; the slow one runs 10,000 requests against the command
and ends it with SIGTERM in the middle.
"""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.serving.models import make_adapters, prepared
from tests.serving.serving import running

PROMPTS = ("Once upon a time", "One day", "The dog", "Lily and Tom went to the park. ")


def asked(random: random.Random) -> tuple[str, bytes]:
    """The kind of a request and its body."""
    kind = random.choice(("answer", "answer", "stream", "leaves", "slow", "large", "broken", "unknown", "long"))
    body = {"model": random.choice(("base", "small", "large")), "prompt": random.choice(PROMPTS), "temperature": 0}
    body |= {"max_tokens": random.randint(1, 6)}
    body |= {"stream": {"stream": True, "max_tokens": 6}, "slow": {"stream": True}, "leaves": {"max_tokens": 150}}.get(
        kind, {}
    )
    body |= {"unknown": {"model": "nobody"}, "long": {"max_tokens": 100000}}.get(kind, {})
    content = json.dumps(body).encode()
    return kind, {"broken": content[:-3], "large": content + b" " * (1 << 20)}.get(kind, content)


async def send(address: tuple[str, int], kind: str, body: bytes) -> tuple[str, int | None, bytes]:
    """Kind, status and content; without a status if this client left, or the server had ended."""
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError:
        return kind, None, b""
    try:
        fields = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head = "\r\n".join([*fields, "Connection: close", f"Content-Length: {len(body)}", "", ""])
        writer.write(head.encode() + body)
        if kind == "leaves":
            await asyncio.sleep(0.05)
            return kind, None, b""
        if kind == "slow":
            await asyncio.sleep(0.5)
        content = await asyncio.wait_for(reader.read(), 300)
        status, _, rest = content.partition(b"\r\n\r\n")
        return kind, int(status.split()[1]) if status else None, rest
    except OSError:
        return kind, None, b""
    finally:
        writer.close()


async def send_all(
    address: tuple[str, int], count: int, together: int = 24
) -> list[tuple[bytes, tuple[str, int | None, bytes]]]:
    source, gate = random.Random(0), asyncio.Semaphore(together)

    async def one(kind: str, body: bytes) -> tuple[bytes, tuple[str, int | None, bytes]]:
        async with gate:
            return body, await send(address, kind, body)

    return await asyncio.gather(*(one(*asked(source)) for _ in range(count)))


STATUS = {"answer": 200, "stream": 200, "slow": 200, "large": 413, "broken": 400, "unknown": 404, "long": 400}


def check(results: list[tuple[bytes, tuple[str, int | None, bytes]]]) -> Counter[int | None]:
    """Requires that each answer has the status of its kind, and that equal requests have equal answers."""
    texts: dict[bytes, str] = {}
    for body, (kind, status, content) in results:
        if kind == "leaves":
            continue
        assert status in (STATUS[kind], 429, 503), (kind, status, content[:300])
        if kind == "answer" and status == 200:
            text = json.loads(content)["choices"][0]["text"]
            assert texts.setdefault(body, text) == text
        if status == 200 and kind != "answer":
            assert b"[DONE]" in content
    return Counter(status for _, (_, status, _) in results)


def test_all_kinds_of_requests_at_once(story_llama: Path, tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, story_llama)
    options = ["--rows", "4", "--context", "200", "--waiting", "12", "--body-mib", "1"]
    with running(*prepared(story_llama, adapters, *options)) as server:
        host, port = server.url.removeprefix("http://").rstrip("/").split(":")
        found = check(asyncio.run(send_all((host, int(port)), 120)))
        assert found[200] > 10
        end = time.monotonic() + 60
        while server.scheduler.busy or server.scheduler.waiting:
            assert time.monotonic() < end
            time.sleep(0.05)


def _memory(process: int) -> int:
    """Resident KiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.slow
def test_ten_thousand_requests_and_a_signal(story_llama: Path, tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path, story_llama)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    named = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    words = ["--model", str(story_llama), "--name", "base", "--port", str(address[1]), "--context", "200"]
    command = [sys.executable, "-m", "flacuna_jax", "serve", *words, *named, "--body-mib", "1", "--dtype", "float32"]
    server = subprocess.Popen([*command, "--grace", "20"])

    def is_up() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/health")
        except OSError:
            return False
        return True

    try:
        end = time.monotonic() + 300
        while not is_up():
            assert time.monotonic() < end
            time.sleep(0.2)
        check(asyncio.run(send_all(address, 1000)))
        before = _memory(server.pid)
        check(asyncio.run(send_all(address, 9000)))
        # Compiled programs of sizes that the first thousand did not need, and the allocator's slack.
        assert _memory(server.pid) < before + (200 << 10)

        async def end_in_the_middle() -> list[tuple[bytes, tuple[str, int | None, bytes]]]:
            task = asyncio.ensure_future(send_all(address, 200))
            await asyncio.sleep(1)
            os.kill(server.pid, signal.SIGTERM)
            return await task

        ended = asyncio.run(end_in_the_middle())
        check([(body, result) for body, result in ended if result[1] is not None])
        assert server.wait(60) == 0
    finally:
        server.kill()
