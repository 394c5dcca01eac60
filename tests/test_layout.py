"""Who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wraploop"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def own_imports(path):
    """The modules of the package that the file at `path` imports, and how deep in it."""
    found = []
    package = ("wraploop", *path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(name, id(node) in inside) for name in names if name.startswith("wraploop")]
    return found


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_the_two_halves_import_nothing_of_each_other(name):
    imported = {imported for imported, _ in own_imports(FILES[name])}
    if name.startswith("wrappers/"):
        allowed = ("wraploop.wrappers", "wraploop.processes")
        assert all(i == "wraploop" or i.startswith(allowed) for i in imported)
    else:
        assert not any(i.startswith("wraploop.wrappers") for i in imported)


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_our_own_is_imported_inside_a_function(name):
    assert not [imported for imported, is_inside in own_imports(FILES[name]) if is_inside]


def test_imports_go_one_way():
    names = {f"wraploop.{name[:-3].replace('/', '.')}".removesuffix(".__init__") for name in FILES}
    graph = {
        f"wraploop.{name[:-3].replace('/', '.')}".removesuffix(".__init__"): {
            i for i, _ in runtime_imports(path) if i in names
        }
        for name, path in FILES.items()
    }
    del graph["wraploop"]
    while graph:
        leaves = [name for name, imports in graph.items() if not imports & graph.keys() - {name}]
        assert leaves, f"a cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def runtime_imports(path):
    """As `own_imports`, without what only type checkers see."""
    source = path.read_text()
    if "if TYPE_CHECKING:" not in source:
        return own_imports(path)
    guarded = {
        id(node)
        for block in ast.walk(ast.parse(source))
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    assert guarded
    typed = {
        name
        for block in ast.walk(ast.parse(source))
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    return [(name, inside) for name, inside in own_imports(path) if name not in typed]
