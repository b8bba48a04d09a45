"""The arrows between modules are kept: the contracts in pyproject.toml, and each of them fails when it is broken.
Functions stay within the limits of CONTRIBUTING.md, and tests use public names only."""

import ast
import graphlib
import os
import re
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


DOCUMENTED = {"_exit"}  # os._exit


def private_names(source):
    """(line, name) of every private name of another module or object that Python source uses, imports or replaces."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names = [node.attr]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            names = [
                a.value.rpartition(".")[2]
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
        found += [
            (node.lineno, n) for n in names if n.startswith("_") and not n.startswith("__") and n not in DOCUMENTED
        ]
    return found


def test_tests_use_public_names():
    files = list((ROOT / "tests").rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in private_names(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 50 and not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ["a._b()", "from a import _b", "import a._b", "monkeypatch.setattr(a, '_b', 1)", "m.setattr('a._b', 1)"]
)
def test_a_private_name_is_found(line):
    assert private_names(line) == [(1, "_b")] and not private_names(line.replace("_b", "b"))
    assert not private_names("self._b = a.__name__")


def test_the_tree_of_tests_is_that_of_the_code():
    for folder in {
        path.parent for package in ("uscl_hub", "training") for path in (ROOT / "tests" / package).rglob("*.py")
    }:
        assert (ROOT / folder.relative_to(ROOT / "tests") / "__init__.py").is_file(), folder


LIMITS = {"lines": 60, "arguments": 6}
REASON = re.compile(r"# (\d+) (lines|arguments): \w+")


def beyond_the_limits(source):
    """(line, what) of functions that are longer or take more arguments than LIMITS, and of reasons that are not right.

    A reason is a comment above the function or in its signature: `# 7 arguments: why`, `# 70 lines: why`.
    """
    lines, found = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        sizes = {
            "lines": node.end_lineno - node.lineno + 1,
            "arguments": len(names) - (names[:1] in (["self"], ["cls"])),
        }
        first = min(part.lineno for part in (node, *node.decorator_list))
        above = next((i for i in range(first - 1, 0, -1) if not lines[i - 1].lstrip().startswith("#")), 0)
        signature = lines[above : max(node.lineno, node.body[0].lineno - 1)]
        reasons = {what: int(number) for number, what in REASON.findall("\n".join(signature))}
        for what, size in sizes.items():
            if (size > LIMITS[what] or what in reasons) and reasons.get(what) != size:
                found.append((node.lineno, f"{node.name} has {size} {what}"))
    return found


def test_functions_are_short_and_take_few_arguments():
    files = [path for package in ("uscl_hub", "training") for path in (ROOT / package).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in files
        for line, what in beyond_the_limits(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 100 and not found, "\n".join(found)


def test_what_is_beyond_the_limits_is_found():
    long = "def f():\n" + "    x = 1\n" * 60
    wide = "def f(a, b, c, /, d, e, *, f, g=1, **more):{}\n    pass\n"
    assert beyond_the_limits(long) == [(1, "f has 61 lines")] and not beyond_the_limits(long[:-10])
    assert not beyond_the_limits("# 61 lines: a table\n" + long)
    assert beyond_the_limits(wide.format("")) == [(1, "f has 7 arguments")]
    assert beyond_the_limits(wide.format("  # 7 arguments:")) and beyond_the_limits(wide.format("  # 8 arguments: as"))
    assert not beyond_the_limits(wide.format("  # 7 arguments: those of timm"))
    assert beyond_the_limits("# 2 arguments: no need\ndef f(a, b):\n    pass\n") == []
    assert beyond_the_limits("# 3 arguments: no longer\ndef f(a, b):\n    pass\n") == [(2, "f has 2 arguments")]
    assert beyond_the_limits("class A:\n    def f(self, a, b, c, d, e, f):\n        pass\n") == []
