"""The site has the repository's own layout, so that a relative link means the same in both.

Code that is a public name becomes a link to the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"\]\(([^)\s#]+)")
# Headings, links and blocks of code stay as they are. Other code that is one name, or a call, may be a link.
PIECES = re.compile(r"(<h[1-6]\b.*?</h[1-6]>|<a\b.*?</a>|<pre\b.*?</pre>)", re.DOTALL)
NAME = re.compile(r"(?<!verl's )(?<!TRL's )<code>([\w.]+)(?:\([^<]*\))?</code>")
# The modules whose names are looked for. In others a name may be an everyday word, such as main.
SCOPES = ("aer_fast", "aer_fast.integrations.transformers")


def on_files(files: Files, config: Any) -> Files:
    """README, CONTRIBUTING, CHANGELOG and docs/, and what they link to, and what that links to."""
    waiting = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *config.extra_css)]
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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a folder of the repository, which is no page of the site, is its words alone."""
    folder = Path(page.file.abs_src_path).parent
    return re.sub(
        r"\[([^][]*)\]\(([^)\s#:]+)\)", lambda m: m[1] if (folder / m[2]).is_dir() else m[0], markdown
    )


def on_env(env: Any, config: Any, files: Files) -> None:
    """Code that is a public name is a link to what the reference says of it."""
    anchor_of = config.plugins["autorefs"].get_item_url

    def linked(code: re.Match[str], url: str, scopes: Iterable[str]) -> str:
        for scope in scopes:
            try:
                to, _ = anchor_of(f"{scope}.{code[1].removeprefix('aer_fast.')}", from_url=url)
            except KeyError:
                continue
            return f'<a href="{to}">{code[0]}</a>'
        return code[0]

    for page in (file.page for file in files.documentation_pages()):
        scopes = ["aer_fast.reference", *SCOPES] if page.file.src_uri == "docs/api-reference.md" else SCOPES
        pieces = PIECES.split(page.content)  # what may become links, what stays, what may, ...
        pieces[::2] = [NAME.sub(partial(linked, url=page.url, scopes=scopes), text) for text in pieces[::2]]
        page.content = "".join(pieces)
