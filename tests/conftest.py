"""Shared fixtures. The environment is fixed before jax is imported anywhere: four CPU devices, no accelerator."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.hub_server import Hub

# Hypothesis draws the same examples in every run, for reproducibility. HYPOTHESIS_PROFILE=default draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skipped-to",
        metavar="FILE",
        help="append the ids of skipped tests to this file, to run them with another interpreter: pytest @FILE",
    )


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--skipped-to"):
        config.pluginmanager.register(_SkippedTo(Path(file)))


class _SkippedTo:
    """Records skipped tests in every process of a distributed run; an id can be recorded more than once."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):
            self._note(report)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped:
            with self.file.open("a") as stream:
                stream.write(report.nodeid + "\n")


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    return pytest.importorskip("torch", reason="compares with torch")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="compares with transformers")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Public sample data (LLaMA tokenizer, a small trained LLaMA, Alpaca, ...); skips if it is absent."""
    directory = os.environ.get("FLACUNA_TEST_DATA", "")
    if not directory or not Path(directory).is_dir():
        pytest.skip("FLACUNA_TEST_DATA does not name a directory with the sample data")
    return Path(directory).resolve()


@pytest.fixture(scope="session")
def story_llama(test_data: Path) -> Path:
    """A trained 656K-parameter LLaMA (GQA, tied embeddings) in Hugging Face layout."""
    return test_data / "story_llama_hf"


@pytest.fixture(scope="session")
def llama_tokenizer(test_data: Path) -> Path:
    """Directory with the LLaMA SentencePiece model (32,000 pieces)."""
    return test_data / "llama_tokenizer"


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised corpora are cached in a directory of the test session, never in the user's own cache."""
    directory = tmp_path_factory.mktemp("token_cache")
    os.environ["FLACUNA_CACHE"] = str(directory)
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> Iterator["Hub"]:
    """A stand-in of the Hugging Face Hub, which huggingface_hub talks to, with an empty cache and without a token."""
    pytest.importorskip("huggingface_hub", reason="needs the hub extra")
    from tests.hub_server import hub_for_client

    with hub_for_client(tmp_path) as server:
        yield server


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """Enables SIGINT and SIGHUP, here and in child processes, even if nohup or & started the suite."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in zip(before, (signal.default_int_handler, signal.SIG_DFL), strict=True):
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled_programs")


@pytest.fixture(scope="module")
def compiled_once(compiled_programs: Path) -> Iterator[None]:
    """Whole runs, here and in separate processes, share compiled programs, which saves three quarters of the time."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(compiled_programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
    compilation_cache.reset_cache()


@pytest.fixture
def small_disk(tmp_path):
    """A mounted directory with 1 MiB of space; skips if this user may not mount."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
