"""What the pages of the documentation show as Python is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```python" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_on_a_page_runs(page: Path) -> None:
    namespace: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in set(re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))):
        assert (page.parent / link).exists(), link
