"""The page Start and the notebook, executed from beginning to end."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, snippets

PAGE = "docs/start.md"
LINES = [line for one in snippets("bash") if one.page == PAGE for line in one.text.splitlines()]


def test_outputs_are_of_commands_on_the_page():
    outputs = re.findall(r"<!-- output: (\w+) -->\n```text\n\$ (.*)", (ROOT / PAGE).read_text())
    assert len(outputs) == 7
    assert [command for name, command in outputs if command not in LINES and name != "mistake"] == []


@pytest.mark.slow
def test_every_command_of_the_page_succeeds(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    executed = 0
    for line in LINES:
        if line.startswith(("pip ", ". .venv")) or "hf:" in line:  # the interpreter of the tests has what they install
            continue
        command = line.replace("make demo", "python -m flacuna_jax.demo")
        command = re.sub(r"^flacuna (\w+)", r"python -m flacuna_jax.\1", command)
        if " -m flacuna_jax.serve" in command:
            _serves(command, tmp_path, environment)
        else:
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        executed += 1
    assert executed >= 7
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


def _serves(command: str, directory: Path, environment: dict[str, str]) -> None:
    """Starts the server of the page, on a free port, until it lists the tuned model."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    server = subprocess.Popen(f"exec {command} --port {port}", shell=True, cwd=directory, env=environment)
    try:
        end = time.monotonic() + 300
        while True:
            assert server.poll() is None, f"{command} ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                    assert "first" in [model["id"] for model in json.load(answer)["data"]]
                return
            except OSError:
                assert time.monotonic() < end
                time.sleep(1)
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the docs extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the docs extra")
    pytest.importorskip("ipykernel", reason="needs the docs extra")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    os.environ["PYTHONPATH"] = str(ROOT)
    # Ten minutes on two idle cores are the promise of the page; other tests may run at the same time.
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "learned: Hello!" in printed
    assert (tmp_path / "runs" / "quickstart" / "merged" / "model.safetensors").is_file()
