"""The package has the structure that ARCHITECTURE.md describes: one import order, small parts, a light import."""

import ast
import inspect
import re
import statistics
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

# Items of the list of folders: - `display/` (no torch): what it contains
FOLDERS = dict(re.findall(r"^- `(\w+)/`( \(no torch\)|):", PAGE, re.MULTILINE))
ORDER = list(FOLDERS)
HEAVY = {"torch", "transformers"}


def folder_of(path: Path) -> str:
    """The folder of the package that a file belongs to: inspection/views/lens.py is part of inspection."""
    return path.relative_to(PACKAGE).parts[0]


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
INSIDE = {name: path for name, path in FILES.items() if name != "__init__.py"}  # that one is the public list
LINES = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}


def entries(folder: str) -> dict[str, str]:
    """The files and folders that a folder's docstring lists, in order, each with its description."""
    page = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    return dict(re.findall(r"^(\w+(?:\.py|/)) +(.+)$", page, re.MULTILINE))


ENTRIES = {folder: entries(folder) for folder in ORDER}
LIGHT = [
    f"{folder}/{entry}"
    for folder, listed in ENTRIES.items()
    for entry, text in listed.items()
    if entry.endswith(".py") and (FOLDERS[folder] or text.endswith("(no torch)"))
]


def imported(path: Path, body: ast.AST) -> Iterator[str]:
    """Absolute dotted names of all imports in `body`, a part of the file at `path`."""
    folder = ("falcon_kit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1]] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def runs_at_import(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and `if TYPE_CHECKING:` blocks, whose imports run later or never."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Prune().visit(tree)


def third_party_after(statement: str) -> set[str]:
    """Packages that a statement loads in a fresh interpreter, without the standard library and the kit."""
    code = f"import sys\nbefore = {{*sys.modules}}\n{statement}\nprint(*{{*sys.modules}} - before)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0] for module in ended.stdout.split()}
    return loaded - sys.stdlib_module_names - {"falcon_kit"}


# One order


def own_imports(name: str) -> list[list[str]]:
    """The kit's own modules that a file imports, split at the dots, without "falcon_kit"."""
    path = INSIDE[name]
    modules = imported(path, ast.parse(path.read_text()))
    return [[*module.split(".")[1:], ""] for module in modules if module.startswith("falcon_kit")]


@pytest.mark.parametrize("name", INSIDE)
def test_a_file_imports_only_from_folders_above_its_own(name):
    own = folder_of(INSIDE[name])
    allowed = {*ORDER[: ORDER.index(own)], own}
    assert [module for module in own_imports(name) if module[0] not in allowed] == []


@pytest.mark.parametrize("name", INSIDE)
def test_a_file_imports_only_from_files_above_it_in_its_folder(name):
    folder, inside, *_ = [*Path(name).parts, ""]
    order = [entry.rstrip("/").removesuffix(".py") for entry in ENTRIES[folder]]
    own = inside.removesuffix(".py")
    allowed = {*order[: order.index(own)], own} if own != "__init__" else {*order}
    assert [module for module in own_imports(name) if module[0] == folder and module[1] not in allowed] == []


def test_architecture_md_lists_every_folder():
    assert sorted(ORDER) == sorted({folder_of(path) for path in INSIDE.values()})


@pytest.mark.parametrize("folder", ORDER)
def test_a_folders_docstring_lists_its_files(folder):
    files = {path.name + ("" if path.suffix else "/") for path in (PACKAGE / folder).iterdir() if holds_python(path)}
    assert sorted(ENTRIES[folder]) == sorted(files - {"__init__.py"})


def holds_python(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def test_the_folders_of_tests_mirror_those_of_the_package():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == {*ORDER, "browser", "project"}


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    tree = re.search(r"^```\n(falcon_kit/ .*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    shown = [line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("    ")]
    assert shown == ORDER


def test_every_folder_is_in_the_tree_of_the_readme():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.partition("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    assert [folder for folder in sorted(folders) if f"\n{folder}/ " not in README] == []


def test_no_file_is_named_for_holding_anything():
    assert [name for name in FILES if Path(name).name in {"utils.py", "helpers.py", "common.py", "misc.py"}] == []


# Small parts


def test_no_file_is_longer_than_350_lines():
    assert {name: lines for name, lines in LINES.items() if lines > 350} == {}


def test_functions_are_short():
    lengths = {
        f"{name}::{node.name}": node.end_lineno - node.lineno + 1
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 50} == {}
    assert statistics.median(lengths.values()) <= 8


# A light import


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_file_imports_no_torch(name):
    path = FILES[name]
    tree = runs_at_import(ast.parse(path.read_text()))
    assert {module.partition(".")[0] for module in imported(path, tree)} & HEAVY == set()


@pytest.mark.parametrize("folder", sorted({name.partition("/")[0] for name in LIGHT}))
def test_light_files_load_no_torch_through_others(folder):
    modules = [name.removesuffix(".py").replace("/", ".") for name in LIGHT if name.startswith(f"{folder}/")]
    assert third_party_after("; ".join(f"import falcon_kit.{module}" for module in modules)) & HEAVY == set()


def test_importing_the_kit_loads_only_psutil_and_the_standard_library():
    assert third_party_after("import falcon_kit") == {"psutil"}


def test_listing_the_kit_loads_no_more():
    assert third_party_after("import falcon_kit; assert {*falcon_kit.__all__} <= {*dir(falcon_kit)}") == {"psutil"}


# The public list


@pytest.mark.parametrize("name", falcon_kit.__all__)
def test_a_public_name_has_a_docstring(name):
    public = getattr(falcon_kit, name)
    documentation = inspect.getdoc(public)
    assert documentation
    # A dataclass without a docstring gets its signature as docstring.
    assert not documentation.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = falcon_kit.no_such_name


# Slow tests


def test_every_slow_test_exists():
    files = list((ROOT / "tests").rglob("test_*.py"))
    names, sources = {path.name for path in files}, "".join(path.read_text() for path in files)
    slow = (ROOT / "tests/slow.txt").read_text().split()
    assert [name for name in slow if name not in names and f"def {name}(" not in sources] == []
    assert slow == sorted(set(slow))
