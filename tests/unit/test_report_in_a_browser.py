"""The report in a real browser: it draws, complains of nothing, asks for nothing, and fits."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dist.report.page import render_page
from peft_dist.report.run_data import read_runs
from tests.browser import DESKTOP, PHONE, Browser, started
from tests.faults.long import cases
from tests.unit.test_report import EVENTFUL, HOSTILE
from tests.unit.whole_runs import Story, write_run

pytestmark = pytest.mark.slow
SIZES = {"desktop": DESKTOP, "phone": PHONE}
FIGURES = 13
DRAWN_WIDTH = """
return [...document.querySelectorAll(".plot")].map(
  (node) => [node.dataset.figure, node._fullLayout._size.w / node.clientWidth]);
"""
COLOURS = """
const node = document.querySelector("[data-figure=loss]");
return [node.data[0].line.color, node.layout.font.color,
        getComputedStyle(document.body).backgroundColor];
"""
OVERFLOWING = """
return [...document.querySelectorAll("body *")].filter((node) =>
  node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".scroll, pre"))
  .map((node) => node.outerHTML.slice(0, 120));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return pages about one run that was restarted and three that are held side by side."""
    folder = tmp_path_factory.mktemp("pages")
    quiet = {**EVENTFUL, "interrupted_at": (), "cut_off_at": (), "skipped": ()}
    stories = {
        "restarted": Story(**EVENTFUL),
        "rank 16": Story(**quiet, rank=16, seed=1),
        f"{HOSTILE[:8]}& high rate": Story(**quiet, rate=4e-3, seed=2),
    }
    runs = [write_run(folder / name, story) for name, story in stories.items()]
    found = {"one": folder / "one.html", "three": folder / "three.html"}
    found["one"].write_text(render_page(read_runs(runs[:1])), encoding="utf-8")
    found["three"].write_text(render_page(read_runs(runs)), encoding="utf-8")
    return found


@pytest.mark.parametrize(
    ("which", "size", "dark"),
    [
        ("one", "desktop", False),
        ("three", "phone", True),
        ("one", "phone", False),
        ("three", "desktop", True),
    ][: cases(2, 4)],
)
def test_every_figure_is_drawn_and_nothing_is_asked_for(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, which: str, size: str, dark: bool
) -> None:
    browser.open(pages[which], size=SIZES[size], dark=dark)
    points = browser.points()
    assert len(points) == FIGURES
    for key, (counts, shapes) in points.items():
        assert counts and min(counts) > 0, key
        assert shapes > 0, key
    assert [(key, share) for key, share in browser.run(DRAWN_WIDTH) if share < 0.55] == []
    assert browser.complaints() == []
    assert browser.requests() == [pages[which].as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") <= SIZES[size][0]
    assert browser.run(OVERFLOWING) == []
    assert "peft-dist report" in browser.run("return document.title")
    name = f"report-{which}-{size}-{'dark' if dark else 'light'}.png"
    browser.screenshot(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 50_000


@pytest.mark.slow
def test_the_colours_follow_the_system_while_the_page_is_open(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["one"])
    light = browser.run(COLOURS)
    browser.prefer(dark=True)
    dark = browser.until(COLOURS, lambda found: found[0] != light[0])
    assert all(one != other for one, other in zip(light, dark, strict=True))
    browser.prefer(dark=False)
    browser.until(COLOURS, lambda found: found == light)


@pytest.mark.slow
def test_the_numbers_of_a_figure_open_without_a_mouse(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["one"])
    tables = "return document.querySelectorAll('figure details table tbody tr').length"
    assert browser.run(tables) >= FIGURES
    names = browser.run(
        "return [...document.querySelectorAll('.plot')].map((node) =>"
        " document.getElementById(node.getAttribute('aria-labelledby')).textContent)"
    )
    assert len(names) == FIGURES
    assert all(len(name) > 20 for name in names)
