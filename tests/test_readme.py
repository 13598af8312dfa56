"""What the README shows, run as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_python_example_runs(runtime_dir: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 1
    environment = {
        "VCACHE_RUNTIME_DIR": str(runtime_dir / "run"),
        "VCACHE_SERVER_IDLE_EXIT_S": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", examples[0]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_documents_name_is_there() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text()
        for name in re.findall(
            r"`((?:vcache|metadata_server|integration|configs|tests|benchmarks|docs)/[\w./]*)`", text
        ):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
