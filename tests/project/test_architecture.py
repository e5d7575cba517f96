"""The package has the shape that ARCHITECTURE.md describes: one order of modules, and a light import."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import falcon_kit

PACKAGE = Path(falcon_kit.__file__).parent
ROOT = PACKAGE.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
README = (ROOT / "README.md").read_text()

# Rows of the module table: | `chat.py` | what it holds | no torch | today |
ROWS = re.findall(r"^\| `(\w+)(?:\.py|/)` \|.*\| *(no torch|) *\| *(today|planned) *\|$", PAGE, re.MULTILINE)
ORDER = [name for name, _, _ in ROWS]
LIGHT = [name for name, torch, state in ROWS if torch == "no torch" and state == "today"]
HEAVY = {"torch", "transformers"}


def unit(path: Path) -> str:
    """The module of the order that a file belongs to: inspection/lens.py is part of inspection."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
UNITS = sorted({unit(path) for path in FILES.values()} - {"__init__"})
FREE = {"__init__", "falconet"}  # may import everything


def imported(path: Path, body: ast.AST) -> Iterator[str]:
    """Absolute dotted names of everything that `body`, a part of the file at `path`, imports."""
    folder = ("falcon_kit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1]] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def runs_at_import(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and `if TYPE_CHECKING:` blocks, whose imports happen later or never."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Prune().visit(tree)


def heavy_modules_after(statement: str) -> list[str]:
    """Which of torch and transformers a fresh interpreter has loaded after running a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({HEAVY} & sys.modules.keys()))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


# One order


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if unit(path) not in FREE])
def test_a_file_imports_only_from_modules_above_it(name):
    path = FILES[name]
    own = unit(path)
    allowed = {*ORDER[: ORDER.index(own)], own}
    own_imports = [module for module in imported(path, ast.parse(path.read_text())) if module.startswith("falcon_kit")]
    assert [module for module in own_imports if [*module.split("."), ""][1] not in allowed] == []


@pytest.mark.parametrize("name", UNITS)
def test_a_module_has_its_row_in_architecture_md(name):
    assert name in ORDER


def test_architecture_md_says_what_exists_today():
    assert sorted(name for name, _, state in ROWS if state == "today") == UNITS


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    tree = re.search(r"^```\n(falcon_kit/ .*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    shown = {line.split()[0].rstrip("/").removesuffix(".py") for line in tree.splitlines() if line.startswith("    ")}
    assert sorted(shown) == UNITS


def test_every_folder_is_in_the_tree_of_the_readme():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.partition("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert [folder for folder in sorted(folders) if f"\n{folder}/ " not in README] == []


def test_helpers_live_with_their_only_caller():
    assert [name for name in FILES if Path(name).name in {"utils.py", "helpers.py", "common.py", "misc.py"}] == []


# A light import


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if unit(path) in LIGHT])
def test_a_light_module_asks_for_no_torch_when_imported(name):
    path = FILES[name]
    tree = runs_at_import(ast.parse(path.read_text()))
    assert {module.partition(".")[0] for module in imported(path, tree)} & HEAVY == set()


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_loads_no_torch_through_others(name):
    assert heavy_modules_after(f"import falcon_kit.{name}") == []


def test_importing_the_kit_loads_no_torch():
    assert heavy_modules_after("import falcon_kit") == []


def test_listing_the_kit_loads_no_torch():
    assert heavy_modules_after("import falcon_kit; assert set(falcon_kit.__all__) <= set(dir(falcon_kit))") == []


# The public list


@pytest.mark.parametrize("name", falcon_kit.__all__)
def test_a_public_name_has_a_docstring(name):
    public = getattr(falcon_kit, name)
    documentation = inspect.getdoc(public)
    assert documentation
    # The signature that a dataclass writes for itself explains nothing.
    assert not documentation.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = falcon_kit.no_such_name
