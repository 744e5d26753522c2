"""Every link of the documentation leads somewhere, and every page is in the site's navigation.

The site itself is built by `make docs`, which checks the same and more.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from os.path import normpath
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
assert _SPEC is not None
assert _SPEC.loader is not None
site = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(site)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"\]\([^)]*\)|[^\w\- ]", "", heading) for heading in headings]
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


def entries(navigation: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the pages of a navigation."""
    for entry in navigation:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else entries(value)


def test_every_link_leads_to_a_page_or_a_file(tmp_path: Path) -> None:
    site.gather(tmp_path)
    pages = {place: (tmp_path / place).read_text("utf-8") for place in site.pages().values()}
    assert len(pages) > 50
    for place, text in pages.items():
        for link in site.links(text):
            target = normpath(f"{Path(place).parent.as_posix()}/{link[2]}")
            assert (tmp_path / target).exists(), f"{place}: {link[2]}"
            if link[3] and target in pages:
                assert link[3][1:] in anchors(pages[target]), f"{place}: {link[2]}{link[3]}"


def test_a_link_that_leads_nowhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("`[no](link)` but [a link](missing.md)\n")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"docs/page\.md links to missing\.md"):
        site.gather(tmp_path / "site")


def test_the_navigation_has_every_page_of_docs() -> None:
    named = list(entries(site.SETTINGS["nav"]))
    assert len(named) == len(set(named))
    pages = site.pages()
    assert set(named) <= set(pages.values())
    behind_a_list = {"decisions", "examples", "benches"}
    missing = {
        place
        for name, place in pages.items()
        if name.startswith("docs/") and place.split("/")[0] not in behind_a_list
    } - set(named)
    assert not missing, f"add them to nav in zensical.toml: {missing}"
