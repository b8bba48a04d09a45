"""The arrows between modules are kept: the contracts in pyproject.toml, and each of them fails when it is broken."""

import graphlib
import os
import shutil
import subprocess
import sys

import grimp
import pytest
from helpers import ROOT

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


def lint(folder):
    """The contracts on the checkout in `folder`: exit status and what import-linter prints."""
    env = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", LINT], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_are_kept():
    status, said = lint(ROOT)
    assert status == 0, said


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("uscl_hub", "training", cache_dir=None)
    needs = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    "module, line, broken",
    [
        ("uscl_hub/files.py", "import training.config", "uscl_hub stands alone"),
        ("uscl_hub/clips/read.py", "from uscl_hub import load", "reading clips needs no model"),
        ("training/method/loss.py", "from training.engine import log", "commands -> engine"),
        ("training/data/groups.py", "from training.evaluation import intervals", "commands -> engine"),
        ("training/engine/log.py", "from training import run", "commands -> engine"),
        ("training/config.py", "from training.data import groups", "commands -> engine"),
        ("training/engine/log.py", "from training.engine import train", "no circles"),
        ("training/unheard_of.py", "", "commands -> engine"),
    ],
)
def test_a_broken_arrow_is_found(module, line, broken, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("uscl_hub", "training"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    with open(tmp_path / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    status, said = lint(tmp_path)
    assert status == 1
    assert any(text.startswith(broken) and "BROKEN" in text for text in said.splitlines()), said


def test_the_tree_of_tests_is_that_of_the_code():
    for folder in {
        path.parent for package in ("uscl_hub", "training") for path in (ROOT / "tests" / package).rglob("*.py")
    }:
        assert (ROOT / folder.relative_to(ROOT / "tests") / "__init__.py").is_file(), folder
