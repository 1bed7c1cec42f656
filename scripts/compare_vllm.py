"""What changed between two versions of vLLM in the names that we build on: those of docs/vllm-surface.md.

    python scripts/compare_vllm.py OLD NEW [NAME ...]

OLD and NEW are folders with a `vllm` package in them; neither is imported. Comments and docstrings don't count.
"""

import ast
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SURFACE = Path(__file__).parents[1] / "docs" / "vllm-surface.md"
ROW = re.compile(r"^\| `([\w.]+:[^`]+)` \|", re.MULTILINE)
# An annotation that is patched where a dataclass keeps it.
FIELD = re.compile(r"__dataclass_fields__\[(\w+)\]\.type")


class Definition(NamedTuple):
    module: str
    node: ast.stmt

    def code(self) -> list[str]:
        tree = ast.parse(ast.unparse(self.node))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                node.body = [one for one in node.body if not _is_text(one)] or [ast.Pass()]
        return ast.unparse(tree).splitlines()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def find(root: Path, name: str) -> Definition | None:
    """Where `module:Class.member` is defined, through imports."""
    module, _, path = FIELD.sub(r"\1", name).partition(":")
    file = next(filter(Path.is_file, (root.joinpath(*module.split(".")) / "__init__.py", _file(root, module))), None)
    if file is None:
        return None
    first, *members = path.split(".")
    node = next(_named(first, ast.parse(file.read_text()).body), None)
    if isinstance(node, ast.ImportFrom):
        origin = _origin(node, module if file.name == "__init__.py" else module.rpartition(".")[0])
        original = next(alias.name for alias in node.names if first in (alias.asname, alias.name))
        return find(root, f"{origin}:{'.'.join([original, *members])}")
    for member in members:
        node = next(_named(member, getattr(node, "body", [])), None)
    return Definition(module, node) if node is not None else None


def _file(root: Path, module: str) -> Path:
    return root.joinpath(*module.split(".")).with_suffix(".py")


def _origin(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return str(node.module)
    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parent, *filter(None, [node.module])])


def _named(name: str, body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if node.name == name:
                yield node
            case ast.AnnAssign(target=ast.Name(id=found)) | ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                yield node
            case ast.ImportFrom() if any(name == (alias.asname or alias.name) for alias in node.names):
                yield node
            case ast.If() | ast.Try():
                handlers = [one for handler in getattr(node, "handlers", []) for one in handler.body]
                yield from _named(name, [*node.body, *handlers, *node.orelse])


def compare(old: Path, new: Path, name: str) -> str:
    before, after = find(old, name), find(new, name)
    if before is None or after is None:
        where = [str(folder) for folder, found in ((old, before), (new, after)) if found is None]
        return f"{name}: not defined in {' nor in '.join(where)}"
    difference = list(difflib.unified_diff(before.code(), after.code(), lineterm=""))[2:]
    moved = "" if before.module == after.module else f", moved to {after.module}"
    if not difference:
        return f"{name}: same{moved}"
    return "\n".join([f"{name}: changed{moved}", *(f"    {line}" for line in difference)])


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    old, new, *names = sys.argv[1:]
    for folder in (old, new):
        if not (Path(folder) / "vllm").is_dir():
            sys.exit(f"{folder} has no folder `vllm`. Give site-packages, or a folder made by scripts/overlay_vllm.py.")
    for name in names or [found for found in ROW.findall(SURFACE.read_text()) if found.startswith("vllm")]:
        print(compare(Path(old), Path(new), name))


if __name__ == "__main__":
    main()
