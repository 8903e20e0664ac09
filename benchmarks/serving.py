"""Speed of OpenAI-compatible servers: tokens per second, and time to the first piece and between pieces.

    python benchmarks/serving.py NAME=URL [NAME=URL ...] [--clients 1 8 32] [--tokens 32]

Each URL is the base of the API, as in ours=http://localhost:8000/v1, of a running server; `--served NAME=MODEL` names
the model to ask, by default the first one that the server lists. Every server gets the same prompts in the same order:
first others that are not measured, so that compiling does not count, and, after `--pause` seconds for what it compiles
in the background, those that are, which no server has read before. Each client asks `--each` times, and at least six
requests are made. For each number of clients, one JSON line per server: answers have `--tokens` tokens unless the model
ends them, and are streamed. Servers to compare with:

    flacuna serve --model M --rows 32 --context 1024
    transformers serve M --continuous-batching --port 8001 --device cpu --dtype float32 \\
        --cb-block-size 32 --cb-num-blocks 1024 --cb-max-batch-tokens 2048 --cb-max-memory-percent 0.2
    python -m llama_cpp.server --model M.gguf --port 8002

The second is of `pip install 'transformers[serving]'`; without limits, its cache takes nearly all of the memory.
The third is of `pip install 'llama-cpp-python[server]'`.
"""

import argparse
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WORDS = "the a small big dog cat house tree river ran saw found loves red blue green old new day night"


@dataclass
class Measured:
    """Times of the pieces of answers, in seconds, and what the server counted."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def prompts(count: int, seed: int) -> list[str]:
    """Texts of 8 to 200 words."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS.split(), k=source.randint(8, 200))) for _ in range(count)]


def ask(url: str, model: str, prompt: str, tokens: int, measured: Measured) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    begin = last = time.perf_counter()
    times: list[float] = []
    counted = 0
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("error"):
                raise SystemExit(f"{url}: {event['error']}")
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            choices: list[dict[str, Any]] = event.get("choices") or []
            if choices and choices[0]["delta"].get("content"):
                now = time.perf_counter()
                times.append(now - last)
                last = now
    with measured.lock:
        measured.first.append(times[0] if times else time.perf_counter() - begin)
        measured.gaps += times[1:]
        measured.tokens += counted or len(times)


def measure(url: str, model: str, texts: Sequence[str], tokens: int, clients: int) -> dict[str, float]:
    measured, waiting = Measured(), list(reversed(texts))

    def client() -> None:
        while True:
            with measured.lock:
                if not waiting:
                    return
                text = waiting.pop()
            ask(url, model, text, tokens, measured)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {"tokens_per_second": measured.tokens / (time.perf_counter() - begin)}
    for name, values in (("first", measured.first), ("gap", measured.gaps)):
        cuts = statistics.quantiles(values, n=20) if len(values) > 1 else [*values, 0.0] * 20
        found |= {f"{name}_p50": statistics.median(values or [0.0]), f"{name}_p95": cuts[18]}
    return {key: round(value, 4) for key, value in found.items()}


def first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/models", timeout=60) as reply:
        return str(json.load(reply)["data"][0]["id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--served", action="append", default=[], metavar="NAME=MODEL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pause", type=float, default=15)
    arguments = parser.parse_args()
    served = dict(text.split("=", 1) for text in arguments.served)
    servers = dict(text.split("=", 1) for text in arguments.servers)
    for clients in arguments.clients:
        before, texts = (prompts(max(6, arguments.each * clients), seed) for seed in (2 * clients, 2 * clients + 1))
        for name, url in servers.items():
            model = served.get(name) or first_model(url)
            measure(url, model, before, arguments.tokens, clients)
            time.sleep(arguments.pause)
            found = measure(url, model, texts, arguments.tokens, clients)
            print(json.dumps({"server": name, "clients": clients, **found}), flush=True)


if __name__ == "__main__":
    main()
