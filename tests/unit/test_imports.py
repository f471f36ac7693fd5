"""What an import may load, and who may import what."""

import ast
import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import simlab

PACKAGE = Path(simlab.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
HEAVY = ("torch", "petsc4py", "mpi4py", "matplotlib", "neuralop")
BROUGHT_ALONG = {"annotated-types", "cycler"}  # the vocabulary of pydantic and of matplotlib
TORCH_FREE_IN_LEARN = ("simlab.learn", "simlab.learn.settings", "simlab.learn.operators")

# Imports every module where the heavy packages cannot be found, and says which one it wanted.
_LOOK = """
import importlib, importlib.abc, json, sys
heavy, modules = json.loads(sys.argv[1])

class Barrier(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            wanted.append(name.split(".")[0])
            raise ModuleNotFoundError(f"no {name} here", name=name)

sys.meta_path.insert(0, Barrier())
seen = {}
for module in modules:
    wanted = []
    try:
        importlib.import_module(module)
    except Exception as error:
        wanted = wanted or [f"{type(error).__name__}: {error}"]
    seen[module] = wanted
print(json.dumps(seen))
"""


def _wanted_by(modules):
    """Return, for each module, which heavy packages its import asks for, in one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, json.dumps([HEAVY, modules])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _imports(path):
    """Yield (package, line, whether at run time) for each absolute import of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            yield name.split(".")[0], node.lineno, id(node) not in typing_only


def _importers(package):
    return {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for name, line, at_run_time in _imports(path)
        if name == package and at_run_time
    }


@pytest.fixture(scope="module")
def wanted():
    return _wanted_by(MODULES)


def test_every_module_was_found():
    assert {"simlab", "simlab.core.config", "simlab.linalg.petsc", "simlab.cli"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_import_is_light(module, wanted):
    is_free = module in TORCH_FREE_IN_LEARN or module.startswith("simlab.learn.operators.")
    is_network = module.startswith("simlab.learn.") and not is_free
    assert set(wanted[module]) <= ({"torch", "neuralop"} if is_network else set())


def test_only_comm_imports_mpi4py():
    assert {place.split(":")[0] for place in _importers("mpi4py")} == {"core/comm.py"}


def test_only_the_petsc_module_imports_petsc4py():
    assert {place.split(":")[0] for place in _importers("petsc4py")} == {"linalg/petsc.py"}


def test_only_learn_imports_torch():
    allowed = ("learn/", "cli/probes.py", "problems/fields_file.py")  # probes and .pt files: on use
    assert not [place for place in _importers("torch") if not place.startswith(allowed)]


def test_every_import_is_a_declared_dependency():
    """A package that happens to be installed is not a dependency until pyproject.toml says so."""
    distributions = metadata.packages_distributions()
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {line.split(">=")[0] for line in project["project"]["dependencies"]} | BROUGHT_ALONG
    foreign = {}
    for path in PACKAGE.rglob("*.py"):
        for name, line, at_run_time in _imports(path):
            if not at_run_time or name == "simlab" or name in sys.stdlib_module_names:
                continue
            owners = {item.lower().replace("_", "-") for item in distributions.get(name, [name])}
            if not owners & declared:
                foreign[name] = f"{path.relative_to(PACKAGE)}:{line}"
    assert foreign == {}


def test_types_are_published():
    assert (PACKAGE / "py.typed").is_file()
