"""The site has the repository's own layout, so that a relative link means the same in both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"\]\(([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """README, CONTRIBUTING, CHANGELOG and docs/, and what they link to, and what that links to."""
    waiting = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    waiting += sorted((ROOT / "docs").glob("*.md"))
    found: dict[Path, File] = {}
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        if path.suffix == ".md":
            links = [link for link in LINK.findall(path.read_text()) if ":" not in link]
            waiting += [to for link in links if (to := (path.parent / link).resolve()).is_relative_to(ROOT)]
    docs = ROOT / "docs"
    of_theme = [file for file in files if not Path(file.abs_src_path or docs).is_relative_to(docs)]
    return Files([*of_theme, *found.values()])
