"""The rooms of the house: a room imports only rooms before it, and the core's modules load nothing but torch and numpy."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "teratron"
ROOMS = ["config", "data", "models", "objectives", "parallel", "optim", "checkpoint", "generate", "plan", "train", "tasks", "cli"]
CORE = {
    "config": set(),
    **{room: {"torch", "numpy"} for room in ("data", "models", "objectives", "parallel", "optim", "checkpoint", "train")},
}
"""Outside packages that a room may import at module level; `teratron --help` reads config, so that has none."""


def violations(source: str, module: str) -> list[str]:
    """What the source of a module such as `teratron.data.reader` imports against the rules, a line each."""
    room = module.split(".")[1]
    wrong = []
    for name, line, on_import in imports(ast.parse(source), module):
        package, _, inside = name.partition(".")
        other = inside.partition(".")[0]
        if package == "teratron" and other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
            wrong.append(f"{module}:{line}: imports {name}, and the room '{other}' comes after '{room}'")
        allowed = {"teratron", *sys.stdlib_module_names, *CORE.get(room, {package})}
        if on_import and package not in allowed:
            wrong.append(f"{module}:{line}: imports {package} at module level; import it in the function that uses it")
    return wrong


def imports(tree: ast.AST, module: str, on_import: bool = True) -> Iterator[tuple[str, int, bool]]:
    """Every imported module's full name, its line, and whether importing the file imports it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, on_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            yield from ((f"{origin}.{alias.name}", node.lineno, on_import) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from imports(ast.Module([child], []), module, False)
            yield from imports(ast.Module(node.orelse, []), module, on_import)
        else:
            in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, module, on_import and not in_function)


def modules() -> list[tuple[str, Path]]:
    """Every file of a room with its module name (a package's own file keeps `__init__`, so that `from .` means the package)."""
    files = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE)
    return [(".".join(["teratron", *path.relative_to(SOURCE).with_suffix("").parts]), path) for path in files]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_file_keeps_to_its_room(module: str, path: Path) -> None:
    assert violations(path.read_text("utf-8"), module) == []


def test_every_folder_is_a_known_room() -> None:
    folders = {path.parent.name for path in SOURCE.glob("*/*.py")}
    assert folders <= set(ROOMS), "place the new room in ROOMS and in docs/architecture.md"
    assert "config" in folders


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("teratron.data.reader", "import teratron.models"),
        ("teratron.data.reader", "from teratron import models"),
        ("teratron.data.reader", "from ..models import gpt"),
        ("teratron.data.__init__", "from ..train.loop import Trainer"),
        ("teratron.models.gpt", "def f():\n    from teratron.parallel.mesh import Mesh"),
        ("teratron.config.keys", "if TYPE_CHECKING:\n    from teratron.train import Trainer"),
        ("teratron.models.gpt", "import rich"),
        ("teratron.optim.adamw", "from safetensors.torch import save_file"),
        ("teratron.checkpoint.files", "try:\n    import safetensors\nexcept ImportError:\n    pass"),
        ("teratron.train.loop", "class Loop:\n    from rich.live import Live"),
        ("teratron.config.config", "import torch"),
        ("teratron.data.reader", "if TYPE_CHECKING:\n    pass\nelse:\n    import tokenizers"),
    ],
)
def test_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("teratron.models.gpt", "import math\nimport torch.nn.functional as F\nfrom teratron.config import ModelConfig"),
        ("teratron.data.reader", "from teratron.data.index import Index\nfrom . import index\nfrom .index import Index"),
        ("teratron.checkpoint.files", "def save():\n    from safetensors.torch import save_file"),
        ("teratron.checkpoint.files", "if TYPE_CHECKING:\n    from safetensors import safe_open"),
        ("teratron.data.reader", "from teratron import UserError, __version__"),
        ("teratron.cli.train", "import rich\nfrom teratron.train import Trainer"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []
