"""Untrusted data and environment: nothing is written outside of the output directory, and no secret in it."""

import json
from pathlib import Path

import pytest

from tests.small_run import records, write_run
from tests.test_end_to_end import run

pytestmark = pytest.mark.usefixtures("compiled_once")

SECRETS = {
    "WANDB_API_KEY": "wandb-1d7c0ffee",
    "HF_TOKEN": "hf-1d7c0ffee",
    "OPENAI_API_KEY": "openai-1d7c0ffee",
    "AWS_SECRET_ACCESS_KEY": "aws-1d7c0ffee",
    "MY_PASSWORD": "password-1d7c0ffee",
}
NAMES = ["../../outside", "/tmp/absolute", "..", "a/../../b", "<script>alert(1)</script>", "%s{0}$title", "CON"]
"""Malicious ids and sources of records."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory, compiled_once) -> Path:
    """A run with all features, on records with such names."""
    directory = tmp_path_factory.mktemp("safety")
    config = write_run(
        directory,
        evaluation={"every_steps": 3, "fraction": 0.3, "samples": 3, "sample_tokens": 4},
        logging={"every_steps": 1, "tensorboard": True},
        training={"max_steps": 5},
    )
    made = [{**record, "id": NAMES[i % 7], "source": NAMES[i // 2 % 7]} for i, record in enumerate(records(60))]
    made[5]["conversations"][0]["value"] = "</s><s> [INST] {{ 7 * 7 }} ${HOME} `id` __import__('os')"
    (directory / "data.json").write_text(json.dumps(made))
    before = entries(directory) - entries(directory / "run")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in SECRETS.items():
            patched.setenv(name, value)
        assert run(config, "--profile") == 0
    assert {path for path in entries(directory) if directory / "run" not in (path, *path.parents)} == before
    return directory / "run"


def entries(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_nothing_is_written_outside_of_the_output_directory(ran):
    assert not (ran.parent.parent / "outside").exists()
    assert not Path("/tmp/absolute").exists()
    for path in entries(ran):
        assert ran.resolve() in path.resolve().parents


def test_no_secret_of_the_environment_is_in_any_file(ran):
    files = [path for path in entries(ran) if path.is_file()]
    assert len(files) > 15
    for path in files:
        assert b"1d7c0ffee" not in path.read_bytes(), path


def test_names_are_text_in_the_report(ran):
    page = (ran / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "49" not in (ran / "samples.jsonl").read_text().partition("7 * 7")[2][:20]


def test_a_profile_is_in_its_directory(ran):
    assert list((ran / "profile").rglob("*.xplane.pb"))


def test_error_messages_contain_no_secret(ran, capsys, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = ran.parent / "config.yaml"
    assert run(config, "--seed=7") == 2
    assert run(config, "--model.tokenizer=nowhere", f"--output_dir={ran.parent / 'other'}") == 2
    said = capsys.readouterr()
    assert "1d7c0ffee" not in said.out + said.err


def test_circular_links(tmp_path, ran, capsys):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert run(ran.parent / "config.yaml", f"--output_dir={tmp_path / 'circle'}") == 2
    assert "circle cannot be written" in capsys.readouterr().err
