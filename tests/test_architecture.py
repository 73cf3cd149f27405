"""The house's floors, read off the imports: who may stand on whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "privacy", "checkpointing", "models", "train", "scripts")

MAY_IMPORT = {
    "kernels": {"kernels"},
    "checkpointing": {"checkpointing"},
    "privacy": {"privacy", "kernels"},
    "models": {"models", "kernels"},
    "train": {"train", "models", "privacy", "checkpointing", "kernels"},
    "scripts": {"train", "privacy"},
}
# Inside privacy/ the parts do not know each other; these compose them. All may speak the vocabulary `events`,
# and write their `pages` alike.
COMPOSERS = ("privacy.mechanism", "privacy.ledger", "privacy.audit", "privacy.__main__")
VOCABULARY = {"privacy.events", "privacy.pages"}
# What an auditor runs needs neither torch nor our kernels: all of privacy/ but these.
NEEDS_TORCH = ("privacy.clipping", "privacy.noise", "privacy.mechanism")
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "checkpointing",
    "configs",
    "docs",
    "kernels",
    "models",
    "privacy",
    "scripts",
    "tests",
    "train",
}


def imports_of(path: Path) -> set[str]:
    """Modules a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_floor_imports_only_what_it_stands_on(folder: str) -> None:
    files = sources(folder)
    assert files
    for path in files:
        ours = {name.split(".")[0] for name in imports_of(path)} & set(FOLDERS)
        assert ours <= MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {sorted(ours - MAY_IMPORT[folder])}"


def test_the_parts_of_privacy_do_not_know_each_other() -> None:
    for path in sources("privacy"):
        module = module_of(path)
        own = ".".join(module.split(".")[:2])
        others = {".".join(n.split(".")[:2]) for n in imports_of(path) if n.startswith("privacy.")} - {own} - VOCABULARY
        assert module.startswith(COMPOSERS) or not others, (
            f"{module} imports {sorted(others)}: let privacy.mechanism compose them"
        )


def test_what_an_auditor_runs_needs_no_torch() -> None:
    for path in sources("privacy"):
        if module_of(path) not in NEEDS_TORCH:
            heavy = {name.split(".")[0] for name in imports_of(path)} & {"torch", "triton", "kernels"}
            assert not heavy, f"{module_of(path)} imports {sorted(heavy)}"
    audit = imports_of(ROOT / "scripts" / "audit.py")
    assert not any(name.split(".")[0] in {"torch", "train", "kernels"} for name in audit)


def test_no_file_has_a_name_that_says_nothing() -> None:
    for folder in FOLDERS:
        for path in sources(folder):
            assert path.stem not in {"utils", "helpers", "common", "misc", "manager", "core"}, path


def test_the_top_level_holds_what_the_design_names() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders <= TOP_LEVEL
