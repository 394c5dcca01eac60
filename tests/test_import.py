"""What importing the package costs over importing torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wraploop
from wraploop import lazy

PRINT_NEW = """
import sys, torch
before = set(sys.modules)
import wraploop
from wraploop import *
print(*set(sys.modules) - before)
"""
SELDOM_NEEDED = ("statistics", "torch._dynamo", "torch._inductor", "torch.distributed.elastic")


def test_an_import_loads_little_that_torch_has_not():
    done = subprocess.run(
        [sys.executable, "-c", PRINT_NEW], capture_output=True, text=True, timeout=100, check=True
    )
    new = set(done.stdout.split())

    packages = {name.split(".")[0] for name in new} - sys.stdlib_module_names
    assert packages <= {"wraploop", "torch", "tqdm", "numpy", "typing_extensions"}
    assert not new.intersection(SELDOM_NEEDED)


def test_names_are_imported_when_they_are_asked_for():
    script = (
        "import sys, wraploop\n"
        "def loaded():\n"
        "    return {n for n in sys.modules if n.startswith('wraploop.')} - {'wraploop.lazy'}\n"
        "assert not loaded()\n"
        "assert {'gan', 'GANTraining', 'callbacks', 'Learner'} <= set(dir(wraploop))\n"
        "assert not hasattr(wraploop, 'gans')\n"
        "wraploop.DistributedModel, wraploop.ThreadedCPUParallel, wraploop.wrap\n"
        "halves = ('wraploop.wrappers', 'wraploop.processes')\n"
        "assert not [name for name in loaded() if not name.startswith(halves)]\n"
        "assert wraploop.GANTraining is wraploop.gan.GANTraining\n"
        "assert wraploop.schedules is sys.modules['wraploop.schedules']\n"
        "from wraploop.lr_finder import LRSweep\n"
        "from wraploop import *\n"
        "callbacks.EMA, callbacks.criteria\n"
        "assert 'wraploop.callbacks.sanity' not in loaded()\n"
        "assert callable(lr_find) and Learner is wraploop.learner.Learner\n"
        "from wraploop import gan as imported\n"
        "assert imported is gan is sys.modules['wraploop.gan']\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=100, check=True)


IMPORT_EACH = """
import importlib, os, sys, torch
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(name)
        os._exit(0)  # and with 1 after a traceback
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


def test_each_module_can_be_the_first_that_is_imported():
    package = Path(wraploop.__file__).parent
    paths = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *names], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [wraploop, wraploop.callbacks])
def test_type_checkers_see_the_same_names(package):
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    seen = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for name, home in seen.items():
        given = getattr(package, name)
        if home is None:
            assert given is sys.modules[f"{package.__name__}.{name}"]
        else:
            assert given is getattr(sys.modules[f"{package.__name__}.{home}"], name)
    (names,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    assert set(ast.literal_eval(names)) == set(package.__all__) == seen.keys() <= set(dir(package))
    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    taken = {name for name, home in seen.items() if home}
    assert not modules & taken  # else a module takes its name's place


def test_an_error_inside_a_module_is_not_taken_for_a_missing_name(monkeypatch):
    def fail(name, package=None):
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr(lazy, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="accelerate"):
        getattr(wraploop, "no_such_module")  # noqa: B009
