"""The pages say what is there: links, snippets, targets, verbs, variables and dependencies."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPTS = sorted([*(ROOT / "mpi_runs").glob("*.sh"), *(ROOT / "tools").glob("*.sh")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages):
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, (language, code) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if language in languages
    ]


def words_of(command):
    """Yield what the pages say after a command, in code: ``simlab VERB``, ``make TARGET``."""
    pattern = re.compile(rf"(?:^|[`\s/]){command} ([a-z]+)\b", re.MULTILINE)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [body for language, body in FENCE.findall(text) if language == "bash"]
        code += re.findall(r"`([^`\n]+)`", text)
        for piece in code:
            for line in piece.splitlines():
                for word in pattern.findall(line.split("#")[0]):
                    yield word, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_pages_parses(code):
    ast.parse(code)


@pytest.mark.parametrize("code", blocks("toml"))
def test_toml_in_the_pages_parses(code):
    tomllib.loads(code)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = dict(words_of("make"))
    assert {"setup", "test", "demo"} <= set(named)
    # `make all install` in docs/install.md is PETSc's own
    assert set(named) - targets <= {"all"}


def test_verbs_exist():
    from typer.main import get_command

    from simlab.cli import app

    verbs = set(get_command(app).commands)
    named = dict(words_of("simlab"))
    assert named
    assert set(named) <= verbs


def test_environment_variables_are_in_the_table():
    from simlab.core.environment import VARIABLES

    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(SIMLAB_\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert rows == VARIABLES


def test_each_route_is_marked():
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    routes = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert len(routes) >= 4
    assert not [route for route in routes if not re.search(r"\((un)?tested", route)]


def test_dependencies_are_explained_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {entry.split(">=")[0] for entry in project["dependencies"]}
    extras = {e.split(">=")[0] for some in project["optional-dependencies"].values() for e in some}
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    assert not [name for name in needed | extras if name.lower() not in page]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert (needed | extras) - pinned == {"petsc4py"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_say_what_they_do(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = script.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# ") and len(line) > 30 for line in lines[:3])


@pytest.mark.parametrize("study", ["strong_scaling", "weak_scaling"])
def test_scaling_scripts_explain_themselves(study):
    script = ROOT / "mpi_runs" / f"{study}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--ranks" in done.stdout
