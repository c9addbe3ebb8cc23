# SPDX-License-Identifier: Apache-2.0
"""The import direction: a layer imports only what stands below it, wherever in a file the import is."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import virtiova

PACKAGE = Path(virtiova.__file__).parent

# Lowest first. Those of one line do not know of each other.
ORDER = [
    {"addr", "errors", "spec", "_core", "_load"},
    {"features"},
    {"result"},
    {"policy", "run", "packages"},
    {"wire"},
    {"dma"},
    {"ports"},
    {"ring"},
    {"device"},
    {"transport"},
    {"driver"},
    {"iommu"},
    {"machine"},
    {"probe", "guest", "bench"},
    {"conformance"},
    {"fuzz"},
    {"matrix"},
    {"testing"},
]
ALL = set[str]().union(*ORDER)

MAY_IMPORT: dict[str, set[str]] = {
    layer: set[str]().union(*ORDER[:rank]) for rank, layers in enumerate(ORDER) for layer in layers
}
MAY_IMPORT["report"] = {"addr", "errors", "spec", "features", "result", "policy"}
MAY_IMPORT["guest"] = {"addr", "errors", "spec", "features", "result", "policy", "packages", "machine", "collect"}
# Two towers: what is said (collect, scan) knows nothing of what is tried out.
MAY_IMPORT["collect"] = {"addr", "errors", "spec", "_core", "features", "result", "wire"}
MAY_IMPORT["scan"] = {"addr", "errors", "spec", "features", "result", "policy", "collect"}
MAY_IMPORT["bench"] |= {"serve", "guest"}
MAY_IMPORT["serve"] = {"addr", "errors", "spec", "_core", "features", "wire", "dma", "ring", "device"}
MAY_IMPORT["testing"] |= {"report", "serve"}
MAY_IMPORT["cli"] = ALL - {"testing"} | {"report", "serve", "collect", "scan"}
# The package itself re-exports, and is never imported by its own parts but for the version.
MAY_IMPORT[""] = ALL - {"testing"} | {"report", "serve", "collect", "scan"}
MAY_IMPORT["__main__"] = {"cli"}


def layer_of(module: str) -> str:
    """``virtiova.dma.ram`` is of the layer ``dma``, ``virtiova`` itself of the layer with no name."""
    return [*module.split("."), ""][1]


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported in a module of ``package``, as far as it is ours."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.expr):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"import_module", "__import__"}:
                names = [str(node.args[0].value)]
        for name in names:
            if name.split(".")[0] == "virtiova":
                yield node.lineno, name


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What ``module`` imports and must not."""
    layer = layer_of(module)
    if layer not in MAY_IMPORT:
        return [f"{module}: {layer!r} has no place in the order of layers"]
    package = module if is_package else module.rpartition(".")[0]
    allowed = MAY_IMPORT[layer] | {layer}
    return [
        f"{module}:{line}: {layer or 'virtiova'} must not import {name}"
        for line, name in imported(ast.parse(source), package)
        if name != "virtiova.__version__" and layer_of(name) not in allowed
    ]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@pytest.mark.parametrize(("module", "path"), [pytest.param(*found, id=found[0]) for found in modules()])
def test_imports_only_what_is_below(module: str, path: Path) -> None:
    assert violations(module, path.read_text(), is_package=path.name == "__init__.py") == []


def test_every_layer_is_there() -> None:
    """A layer that is renamed must not stay in the order as a dead word."""
    there = {layer_of(module) for module, _ in modules()} | {path.stem for path in PACKAGE.glob("*.pyi")}
    assert ALL | {"cli", "report", "serve", "collect", "scan"} <= there


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("virtiova.addr", "import virtiova.errors"),
        ("virtiova.policy.rules", "from virtiova.dma.ram import Ram"),
        ("virtiova.policy.rules", "from virtiova import dma"),
        ("virtiova.policy.rules", "from ..dma import ram"),
        ("virtiova.policy.rules", "from .. import dma"),
        ("virtiova.wire.qtest", "def f() -> None:\n    import virtiova.machine.qemu"),
        ("virtiova.wire.qtest", "if TYPE_CHECKING:\n    from virtiova.machine import qemu"),
        ("virtiova.wire.qtest", "importlib.import_module('virtiova.machine')"),
        ("virtiova.report.text", "from virtiova.probe import run"),
        ("virtiova.probe.run", "from virtiova.report import text"),
        ("virtiova.machine.qemu", "from virtiova import Cell"),
        ("virtiova.machine.qemu", "import virtiova"),
        ("virtiova.cli.main", "from virtiova import testing"),
        ("virtiova", "from virtiova.testing import check_ring"),
        ("virtiova.serve.host", "import virtiova.testing"),
        ("virtiova.brandnew", ""),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("virtiova.dma.ram", "from virtiova import _core\nfrom . import space\nimport struct"),
        ("virtiova.probe.run", "from virtiova.machine import qemu\nfrom virtiova.addr import GPA"),
        ("virtiova.report.text", "from virtiova.result import Cell\nfrom ..policy import rules"),
        ("virtiova.cli.main", "from virtiova import __version__, report, probe"),
        ("virtiova", "from virtiova.probe import run"),
        ("virtiova.testing.rings", "from virtiova import machine, serve, report"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert violations(module, source, is_package=module == "virtiova") == []


def tracked_but_ignored(root: Path) -> list[str]:
    """Files that git keeps although they are to be ignored. Checking such a file out replaces what is in its place:
    a tracked ``.venv`` takes everybody's environment away. Outside of a checkout nothing is tracked."""
    if not (root / ".git").exists():
        return []
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--ignored", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.split("\0")[:-1]


def test_nothing_is_tracked_that_is_ignored() -> None:
    assert tracked_but_ignored(Path(__file__).resolve().parent.parent) == []


def test_a_tracked_link_to_an_environment_is_found(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("/.venv\n")
    (tmp_path / ".venv").symlink_to("elsewhere")
    for command in (["init", "-q"], ["add", "-f", ".venv"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], timeout=30, check=True)
    assert tracked_but_ignored(tmp_path) == [".venv"]
