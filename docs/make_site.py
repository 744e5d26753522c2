"""Build the documentation site from the pages of the repository, without a network.

Owns which files are pages, where each is on the site, and where links lead: to another page, to a
picture, or to the file in the repository. zensical.toml has the navigation and the looks. `python
docs/make_site.py` (`make docs`) gathers the pages in build/site-source and writes build/site; a
link that leads nowhere is an error, as is what `zensical build --strict` warns of.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from os.path import normpath, relpath
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "urls"
]["Source"]
SOURCE = ROOT / SETTINGS["docs_dir"]
# Pages outside of docs/.
ELSEWHERE = ("[A-Z]*.md", "examples/**/*.md", "benches/results/*.md")
PICTURES = (".png", ".svg")
_LINK = re.compile(r"(\]\()([^)#\s]*)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^(```.*?^```|    .*?$)|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """Return the pages: path in the repository → path on the site."""
    found = {
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix()
        for path in sorted((ROOT / "docs").rglob("*.md"))
    }
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            found[name] = name
    # A README is the page of its folder; capitals are for a repository's first page.
    return {
        name: re.sub(r"(^|/)README\.md$", r"\1index.md", place).lower()
        for name, place in found.items()
    }


def links(text: str) -> Iterator[re.Match[str]]:
    """Yield the links of a page that lead into the repository, outside of code."""
    code = [match.span() for match in _CODE.finditer(text)]
    for match in _LINK.finditer(text):
        inside = any(start <= match.start() < end for start, end in code)
        if not inside and match[2] and "://" not in match[2]:
            yield match


def gather(target: Path) -> None:
    """Write every page and the pictures that it shows to a folder, with links of the site.

    Raises:
        FileNotFoundError: a link leads to a file that does not exist.
    """
    places = pages()
    for name, place in places.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in reversed(list(links(text))):
            path = normpath((Path(name).parent / link[2]).as_posix())
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{name} links to {link[2]}, which does not exist")
            index = f"{path}/README.md"
            if path in places or index in places:
                new = relpath(places.get(path) or places[index], Path(place).parent)
            elif path.endswith(PICTURES):
                new = relpath(path, Path(place).parent)
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, target / path)
            else:
                kind = "tree" if (ROOT / path).is_dir() else "blob"
                new = f"{REPOSITORY}/{kind}/main/{path}"
            text = text[: link.start(2)] + new + text[link.end(2) :]
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_text(text, encoding="utf-8")


def main() -> int:
    """Gather the pages, build the site, and return the exit status."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    gather(SOURCE)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not status:
        print(f"wrote {ROOT / SETTINGS['site_dir']}/index.html")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
