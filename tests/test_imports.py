"""Who may import whom: "Directions of import" in docs/architecture.md, held by reading them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS: list[set[str]] = [
    {"errors", "limits"},
    {"logs", "config_values"},
    {"config", "keys", "layout", "locks", "processors", "room", "runtime"},
    {"protocol", "table"},
    {"kernels", "segment", "tiers"},
    {"client"},
    {"engine"},
    {"bench", "cli"},
]
"""The parts of `vcache`, the lowest first: each imports only its own layer and lower ones."""

SERVER_MAY_IMPORT = {
    "config",
    "config_values",
    "errors",
    "keys",
    "layout",
    "limits",
    "locks",
    "logs",
    "protocol",
    "runtime",
    "table",
}
"""Of `vcache`, what the server may know: nothing that holds KV, and nothing that talks to a server."""

HEAVY = {"torch", "cupy", "transformers", "vllm", "lmcache"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports in the file, also those inside functions and `if TYPE_CHECKING`.

    `from a import b` counts as a.b: whether b is a module or a name in one, its first parts decide.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(found, ast.Import):
            yield from ((found.lineno, alias.name) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - found.level]) if found.level else ""
            home = ".".join(part for part in (base, found.module) if part)
            yield from ((found.lineno, f"{home}.{alias.name}") for alias in found.names)


def broken(package: str, allowed: object) -> list[str]:
    """Every import in `package` that the rule `allowed(path, name)` refuses, as path:line: name."""
    assert callable(allowed)
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files(package)
        for line, name in imports(path)
        if not allowed(path, name)
    ]


def layer(part: str) -> int:
    found = [index for index, parts in enumerate(LAYERS) if part in parts]
    assert found, f"vcache/{part} has no place in LAYERS: give it one"
    return found[0]


def test_vcache_imports_neither_the_server_nor_the_integrations() -> None:
    foreign = {"metadata_server", "integration", "benchmarks", "demo", "tests"}
    assert broken("vcache", lambda _, name: name.split(".")[0] not in foreign) == []


def test_each_part_of_vcache_imports_only_what_lies_under_it() -> None:
    def allowed(path: Path, name: str) -> bool:
        parts = path.relative_to(ROOT / "vcache").with_suffix("").parts
        home, *rest = name.split(".")
        if home != "vcache" or parts == ("__init__",):  # the package itself exports lazily, from everywhere
            return True
        if rest[:1] == ["__version__"]:
            return True
        return bool(rest) and layer(rest[0]) <= layer(parts[0])

    assert broken("vcache", allowed) == []


def test_the_server_knows_only_the_protocol_and_what_lies_under_it() -> None:
    def allowed(_: Path, name: str) -> bool:
        home, *rest = name.split(".")
        if home == "vcache":
            return rest[:1] == ["__version__"] or bool(SERVER_MAY_IMPORT & set(rest[:1]))
        return home not in HEAVY | {"integration", "benchmarks", "demo"}

    assert broken("metadata_server", allowed) == []


@pytest.mark.parametrize("package", ["vcache", "metadata_server", "benchmarks", "demo"])
def test_only_the_integrations_import_lmcache_and_vllm(package: str) -> None:
    assert broken(package, lambda _, name: name.split(".")[0] not in {"lmcache", "vllm"}) == []


@pytest.mark.parametrize("module", ["metadata_server.server", "vcache", "vcache.protocol", "vcache.config"])
def test_importing_it_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ""


def test_the_imports_of_a_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "vcache" / "engine" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b, c\nfrom d import e\nfrom . import f\nfrom ..g.h import i\ndef j():\n    import k\n"
    )
    assert [name for _, name in imports(path)] == [
        "a.b",
        "c",
        "d.e",
        "vcache.engine.f",
        "vcache.g.h.i",
        "k",
    ]
