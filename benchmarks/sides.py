"""The sides of a comparison as processes that stay alive, so that they can take turns."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Side:
    """A process that answers one JSON object per line with one JSON object."""

    def __init__(self, script: str, python: str) -> None:
        command = [python, str(Path(__file__).parent / script)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, task: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        raise SystemExit(f"a side ended with status {self._process.wait()} in {task}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(side: object) -> None:
    """Answers each line of standard input with the result of the method that it names."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        method: Callable[..., Any] = getattr(side, asked.pop("task"))
        print(json.dumps({"answer": method(**asked)}), file=answers, flush=True)
