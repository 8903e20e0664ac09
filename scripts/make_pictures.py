"""Makes the pictures and the printed outputs of the documentation from real runs.

    make demo                                     # the runs that the pictures show
    pip install pyte websockets 'flacuna-jax[serve]'; apt-get install chromium
    python scripts/make_pictures.py               # everything; or only the named ones: ... plan report

Commands run in a pseudo-terminal, whose screen becomes an SVG file; pages are photographed by headless Chromium.
Drawings (packing, weights) are made by scripts/make_drawings.py.
"""

import argparse
import base64
import copy
import fcntl
import io
import json
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyte
import rich._export_format
from rich.console import Console
from rich.text import Text
from websockets.sync.client import connect

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINES = 110, 400
# As rich writes it, without the fonts that it loads from another host.
SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", rich._export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL)
SVG = SVG.replace("Fira Code", "ui-monospace").replace('"https://www.textualize.io"', '"https://rich.readthedocs.io"')

QUIETLY = "2> >(grep -v --line-buffered -e absl::InitializeLog -e cudart_stub)"
"""Without remarks of CUDA's compiler, which is installed for plans but not needed here."""

FIRST = (
    "flacuna train --config configs/demo.yaml --output_dir=runs/first --lora.rank=4 --lora.alpha=8 "
    "--evaluation='{fraction: 0.05, every_steps: 200}' --logging.every_steps=20"
)
QUESTION = "Which word is the opposite of hot?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}; default: all")
    os.chdir(ROOT)
    PICTURES.mkdir(exist_ok=True)
    for name in parser.parse_args().names or MAKERS:
        print(name, flush=True)
        MAKERS[name]()


def demo() -> None:
    """The output of the whole demo, which takes minutes."""
    shutil.rmtree("runs/demo", ignore_errors=True)
    printed = output_of("python -m flacuna_jax.demo")
    (ROOT / "docs" / "outputs" / "demo.txt").write_text(f"$ make demo\n{printed}", encoding="utf-8")
    write_output("demo_result", "make demo", f"…\n{printed[printed.index('[5/5]') :]}")


def prepare() -> None:
    command = "flacuna prepare --config configs/demo.yaml --show 4"
    photograph("prepare", command, run(command))


def plan() -> None:
    command = "flacuna plan --config configs/demo.yaml"
    photograph("plan", command, run(command))


def plan_13b() -> None:
    record("plan_13b", "flacuna plan --config configs/flacuna_13b.yaml --target 4xA6000 --sizes 13b --estimate")


def train() -> None:
    """A run in the middle and at its end."""
    shutil.rmtree("runs/first", ignore_errors=True)
    middle: list[pyte.Screen] = []

    def look(screen: pyte.Screen) -> None:
        done = re.search(r"training .* (\d+)/", "\n".join(screen.display))
        if not middle and done and int(done[1]) >= 450:
            middle.append(copy.deepcopy(screen))

    end = run(FIRST, look)
    photograph("train", FIRST, middle[0])
    printed = "\n".join(end.display)
    write_output("train", FIRST, f"…\n{printed[re.search(r'^[0-9,]+ of .* steps done', printed, re.M).start() :]}")


def ask() -> None:
    record("generate", f'flacuna generate --run runs/first "{QUESTION}"')
    shutil.rmtree("runs/first-merged", ignore_errors=True)
    record("export", "flacuna export runs/first runs/first-merged --format merged")
    record("check", "flacuna check runs/first-merged")
    record("mistake", "flacuna train --config configs/demo.yaml --training.learning_rat=1e-3", status=2)


def report() -> None:
    with chromium() as browser:
        browser.open((ROOT / "runs" / "first" / "report.html").as_uri())
        browser.photograph(PICTURES / "report.png", height=1100)


def chat() -> None:
    """A question in the page of the server, answered by the tuned model beside the base."""
    port = free_port()
    server = subprocess.Popen(["flacuna", "serve", "--run", "runs/first", "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        with chromium() as browser:
            browser.open(f"http://127.0.0.1:{port}/")
            browser.wait("document.getElementById('model').options.length > 1")
            browser.evaluate("document.getElementById('beside').selectedIndex = 1")
            browser.evaluate("document.getElementById('temperature').value = 0")
            browser.evaluate(f"ask({json.dumps(QUESTION)})")
            browser.wait("document.querySelector('.turn') && !document.querySelector('.running')")
            browser.photograph(PICTURES / "chat.png", height=420)
    finally:
        server.terminate()
        server.wait()


MAKERS: dict[str, Callable[[], None]] = {
    "demo": demo,
    "prepare": prepare,
    "plan": plan,
    "plan_13b": plan_13b,
    "train": train,
    "ask": ask,
    "report": report,
    "chat": chat,
}


def run(command: str, look: Callable[[pyte.Screen], None] = lambda _: None) -> pyte.Screen:
    """Runs a command in a terminal and returns its last screen. `look` is called whenever the screen changes."""
    screen = pyte.Screen(COLUMNS, LINES)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.ByteStream(screen)
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("bash", ["bash", "-c", f"{command} {QUIETLY}"], {**os.environ, "TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux ends a closed terminal with EIO
            break
        if not piece:
            break
        stream.feed(piece)
        look(screen)
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError(
            f"{command}: status {os.waitstatus_to_exitcode(status)}\n" + "\n".join(screen.display).strip()
        )
    return screen


def photograph(name: str, command: str, screen: pyte.Screen) -> None:
    """Writes a screen as docs/pictures/NAME.svg, with the command above it."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold"))
    console.print(colours(screen))
    svg = console.export_svg(title=command.partition(" --")[0], code_format=SVG, unique_id=name)
    (PICTURES / f"{name}.svg").write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


def colours(screen: pyte.Screen) -> Text:
    """The lines of a screen up to the last one that is not empty, with their colours."""
    last = max(row for row, line in enumerate(screen.display) if line.strip())
    return Text("\n").join(line_of(screen, row) for row in range(last + 1))


def line_of(screen: pyte.Screen, row: int) -> Text:
    line = Text()
    for column in range(COLUMNS):
        cell = screen.buffer[row][column]
        colour = {"brown": "yellow", "default": ""}.get(cell.fg, cell.fg)
        colour = f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else colour.replace("bright", "bright_")
        style = [colour, "bold" if cell.bold else "", "reverse" if cell.reverse else ""]
        line.append(cell.data, style=" ".join(filter(None, style)))
    line.rstrip()
    return line


def record(name: str, command: str, status: int = 0) -> None:
    """Writes what a command prints into the pages."""
    write_output(name, command, output_of(command, status))


def output_of(command: str, status: int = 0) -> str:
    done = subprocess.run(
        ["bash", "-c", f"{command} {QUIETLY}"],
        env={**os.environ, "COLUMNS": str(COLUMNS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != status:
        raise RuntimeError(f"{command}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def write_output(name: str, command: str, text: str) -> None:
    """Writes a command and what it printed into the pages, where they have a mark with this name."""
    text = "\n".join(line.rstrip() for line in text.strip().splitlines())
    block = f"<!-- output: {name} -->\n```text\n$ {command}\n{text}\n```"
    for page in (ROOT / "docs").rglob("*.md"):
        before = page.read_text(encoding="utf-8")
        after = re.sub(rf"<!-- output: {name} -->\n```text\n.*?\n```", lambda _: block, before, flags=re.DOTALL)
        if after != before:
            page.write_text(after, encoding="utf-8")


class Browser:
    """A page of Chromium, driven by its DevTools protocol."""

    def __init__(self, address: str) -> None:
        self._connection = connect(address, max_size=2**26)
        self._number = 0

    def __enter__(self) -> "Browser":
        self._socket = self._connection.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(*error)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def evaluate(self, expression: str) -> object:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.2)

    def photograph(self, path: Path, height: int, width: int = 1100) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: object) -> dict:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]


@contextmanager
def chromium() -> Iterator[Browser]:
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # Chromium may still write to it
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        options += " --disable-component-update --disable-sync --hide-scrollbars"
        process = subprocess.Popen(
            [
                "chromium",
                *options.split(),
                f"--user-data-dir={profile}",
                f"--remote-debugging-port={port}",
                "about:blank",
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            pages = json.loads(wait_for(f"http://127.0.0.1:{port}/json"))
            with Browser(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")) as browser:
                yield browser
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(url: str, seconds: float = 180) -> bytes:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                return answer.read()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main())
