"""Goal: the report stands alone, shows what was slow at a glance, and trusts nothing that it shows.

Method: pages of synthetic runs on 1, 2, 16 and 256 ranks, as text and as a real browser shows them: the document after the
scripts ran, and the pixels of a picture of it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from ckpt import config
from ckpt.observe import figures
from ckpt.observe.report import report_page
from ckpt.observe.summary import operations
from tests.observe import browser
from tests.observe.synthetic import run_events, save_events

needs_browser = pytest.mark.skipif(
    browser.find() is None, reason=f"no browser on the PATH ({', '.join(browser.PROGRAMS)}): apt-get install chromium"
)

BRIGHT = (254, 232, 56)  # the top of cividis: the cell that is slowest beyond the median
STRAGGLER = (178, 24, 43)


def text_of(page: str) -> str:
    """The page without its scripts and style."""
    return re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("world", [1, 2, 16, 256])
def test_the_page_has_its_parts_and_stays_small(world: int) -> None:
    page = report_page(run_events(world, straggler=(world - 1, "write", 3.0) if world > 1 else None), run="runs/gpt")
    text = text_of(page)

    assert len(page) < 6_000_000
    for part in ("latest-heat", "latest-timeline", "slowest-heat", "load-heat", "load-timeline", "steps-figure"):
        assert f'id="{part}"' in page
    assert text.count('<tr class="ok">') == 11 and text.count('<tr class="failed">') == 1
    assert ("Straggler: rank" in text) == (world > 1)
    assert "No space left on device" in text


def test_the_page_asks_no_network_for_anything() -> None:
    page = report_page(run_events(2), run="runs/gpt")
    tags = text_of(page) + "".join(re.findall(r"<script[^>]*>", page))

    assert re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", tags) is None
    assert "default-src 'none'" in page


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


def evil_page() -> str:
    """A page of a log in which every text is an attack."""
    events = [
        dataclasses.replace(e, phase=EVIL if e.phase == "copy" else e.phase, attempt=EVIL, detail={"error": EVIL})
        for e in save_events(7, 2, straggler=(1, "copy", 9.0), run=EVIL)
    ]
    return report_page(events, run=EVIL)


def test_a_text_of_the_log_is_shown_and_not_obeyed() -> None:
    page = evil_page()

    assert "<script>document.title" not in page and "<img src=x" not in page
    assert "&lt;img src=x" in text_of(page)


def test_a_chosen_step_is_shown_in_place_of_the_latest() -> None:
    page = text_of(report_page(run_events(2), run="runs/gpt", step=400))

    assert "Chosen save: step 400" in page and "Latest save" not in page


def test_a_log_without_a_finished_save_gives_a_page() -> None:
    events = [event for event in save_events(7, 2) if event.phase in ("walk", "plan")]

    assert '<tr class="unknown">' in report_page(events, run="runs/gpt")
    assert "0 saves and 0 loads" in report_page([], run="runs/gpt")


def test_of_very_many_ranks_the_timeline_shows_the_slowest_and_of_very_many_saves_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "REPORT_RANKS_MAX", 8)
    monkeypatch.setattr(config, "REPORT_ROWS_MAX", 3)
    events = run_events(40, straggler=(33, "write", 3.0))
    page = text_of(report_page(events, run="runs/gpt"))

    assert "the 8 slowest of 40 ranks" in page and "The newest 3 of 12." in page
    assert 33 in figures.timeline_ranks(operations(events)[-1])


def pixels(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has this colour."""
    return (np.abs(picture * 255 - np.array(color)) <= 6).all(axis=2)


@needs_browser
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("world", "slow"), [(1, None), (2, 1), (256, 137)])
def test_a_browser_shows_all_figures_and_the_straggler_at_a_glance(
    world: int, slow: int | None, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    events = run_events(world, straggler=None if slow is None else (slow, "write", 3.0))
    page.write_text(report_page(events, run="runs/gpt"), encoding="utf-8")
    seen = browser.look(page)
    bright = pixels(seen.picture, BRIGHT)

    assert "CONSOLE" not in seen.log, seen.log  # no error of a script, nothing refused by the page's own policy
    assert seen.dom.count('class="main-svg"') >= 2 * 7  # seven figures, of two layers each at least
    assert seen.dom.count('class="point"') >= 6 * world
    for phase in ("walk", "copy", "write", "receipts"):
        assert re.search(rf"<text[^>]*>(<tspan[^>]*>)?{phase}<", seen.dom), phase
    for color in ("copy", "write", "checksum", "fence"):
        code = figures.COLORS[color]
        assert pixels(seen.picture, tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))).sum() > 100, color
    if slow is None:
        assert bright.sum(axis=1).max() < 40 and "Straggler" not in text_of(seen.dom)
        return
    # One bright cell: wide, in one band of rows, framed, with the rank beside it, on the first screen.
    rows = np.flatnonzero(bright.sum(axis=1) >= 60)
    assert len(rows) > 0 and rows[0] < 1000
    assert pixels(seen.picture, STRAGGLER)[:1000].sum() > 200
    assert f"◀ rank {slow}" in seen.dom


@needs_browser
@pytest.mark.timeout(240)
def test_a_browser_runs_nothing_that_the_log_says(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(evil_page(), encoding="utf-8")
    seen = browser.look(tmp_path / "report.html")
    title = re.search(r"<title>(.*?)</title>", seen.dom)

    assert title is not None and title[1].startswith("&lt;/script&gt;")
    assert seen.dom.count('class="main-svg"') >= 2 * 3 and "<img" not in seen.dom and "CONSOLE" not in seen.log
