"""The table of imports in docs/how/architecture.md against the imports of the code."""

import ast
import re
from pathlib import Path

import pytest

import flacuna_jax

ROOT = Path(flacuna_jax.__file__).parent
DOCS = ROOT.parent / "docs" / "how" / "architecture.md"
TABLE = {
    row[0]: row[1]
    for row in re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]* \|$", DOCS.read_text(), re.MULTILINE)
    if (ROOT / row[0]).is_dir()
}
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def imported_packages(package: str) -> set[str]:
    """Packages of ours that the modules of a package import, at the top or inside of functions."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flacuna_jax."):
                found.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("flacuna_jax.")}
    return found & set(PACKAGES) - {package}


def test_the_table_lists_every_package():
    assert sorted(TABLE) == PACKAGES


@pytest.mark.parametrize(
    "package", [package for package in PACKAGES if "all of the above" not in TABLE.get(package, "")]
)
def test_a_package_imports_what_the_table_says(package):
    assert imported_packages(package) == set(re.findall(r"`(\w+)`", TABLE[package])) & set(PACKAGES)


def test_run_imports_all_but_the_collection():
    above = list(TABLE)[: list(TABLE).index("run")]
    assert imported_packages("run") <= set(above) - {"flan_mini"}
