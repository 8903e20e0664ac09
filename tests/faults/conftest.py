"""The run that every disturbed run must equal."""

from pathlib import Path

import pytest

from tests.small_run import write_run
from tests.test_end_to_end import run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled_once) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(write_run(directory)) == 0
    return directory
