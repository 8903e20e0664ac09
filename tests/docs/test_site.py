"""The site: it is built in strict mode (links, anchors, navigation), has its generated parts, and loads nothing from
other hosts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import flacuna_jax
from flacuna_jax.cli import VERBS
from tests.docs.pages import ROOT

pytest.importorskip("mkdocs", reason="needs the docs extra")
pytest.importorskip("material", reason="needs the docs extra")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_settings_and_commands_and_names_are_generated(site):
    settings = (site / "reference" / "settings.html").read_text()
    assert all(setting in settings for setting in ("lora", "learning_rate", "spike_factor", "heartbeat_seconds"))
    assert all(name in settings for name in ("per_device_train_batch_size", "lora_alpha", "pref_beta"))
    commands = (site / "reference" / "commands.html").read_text()
    assert all(f"usage: flacuna {verb}" in commands for verb in VERBS)
    names = (site / "reference" / "api.html").read_text()
    assert all(name in names for name in flacuna_jax.__all__ if not name.startswith("_"))


def test_search_has_its_index(site):
    assert "best-fit" in (site / "search" / "search_index.js").read_text()


def test_pages_load_nothing_from_other_hosts(site):
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:)?//|<link\b[^>]*stylesheet[^>]*https?://"
    )
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text()), page
    for style in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"(@import|url\()\s*[\"']?https?://", style.read_text()), style
