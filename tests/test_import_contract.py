"""Who may import whom: models ← pipeline ← tools, and what must stay light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "models": {"models"},
    "pipeline": {"models", "pipeline"},
    "tools": {"models", "pipeline", "tools"},
}


def imported_packages(file: Path) -> set[str]:
    """First parts of every module a file imports, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the whole name"
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_package_imports_what_stands_above_it(package: str) -> None:
    ours = set(ALLOWED) | {"tests"}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        foreign = (imported_packages(file) & ours) - ALLOWED[package]
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_no_module_of_tools_hides_one_of_the_standard_library() -> None:
    names = {file.stem for file in (ROOT / "tools").rglob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_entry_scripts_can_be_read_at_a_glance() -> None:
    for name in ("pretrain", "finetune", "evaluate"):
        lines = (ROOT / "pipeline" / f"{name}.py").read_text(encoding="utf-8").count("\n")
        assert lines < 100, f"pipeline/{name}.py has {lines} lines"


def test_no_file_is_named_for_nothing() -> None:
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            assert file.stem not in {"utils", "helpers", "common", "misc"}, file


HEAVY = ("torch", "deepspeed", "scipy", "matplotlib", "sentencepiece", "datatrove", "webdataset")


@pytest.mark.parametrize(
    "module",
    ["tools.cli", "pipeline.options", "pipeline.config", "pipeline.plan", "pipeline.assemble"],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_commands_and_their_help_import_nothing_heavy() -> None:
    """Every command's help page, in one process: importing torch once would show."""
    code = f"""
import contextlib, io, sys
from tools.cli import COMMANDS, main
main(["--help"])
for name in COMMANDS:
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    assert page.getvalue().startswith("usage: isoflop " + name), name
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
