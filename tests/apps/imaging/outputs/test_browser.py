"""Both reports in a real browser: no error, no request, and the choices work."""

from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

import pytest

from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import summarise
from apps.imaging.outputs.write import write_batch, write_case
from tests.apps.imaging.outputs.scan import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=which("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def batch(filled: Sample, tmp_path: Path, settings: OutputSettings) -> Path:
    """The directory of a batch with one case."""
    outputs = write_case(filled.case, filled.findings, tmp_path / "cases/1", settings)
    in_batch = {name: f"cases/1/{path}" for name, path in outputs.items()}
    write_batch(
        [summarise(filled.case, filled.findings, in_batch, {"read": 1.0})], tmp_path, settings, 3.0
    )
    return tmp_path


def watched(page: "Page") -> list[str]:
    """Return a list that fills with whatever a page should not do."""
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "data:"))
            else troubles.append(f"request: {request.url}")
        ),
    )
    return troubles


def test_pages_are_quiet_and_lead_from_batch_to_case(browser: "Browser", batch: Path) -> None:
    page = browser.new_page()
    troubles = watched(page)
    page.goto((batch / "index.html").as_uri())
    page.get_by_role("link", name="case-0001").first.click()
    page.wait_for_url("**/cases/1/report.html")
    assert page.get_by_role("heading", level=1).inner_text() == "case-0001"
    sizes = page.eval_on_selector_all("img", "all => all.map(image => image.naturalWidth)")
    assert len(sizes) > 8
    assert min(sizes) > 0
    assert troubles == []
    page.close()


def test_slices_and_layers_are_chosen_without_a_script(browser: "Browser", batch: Path) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto((batch / "cases/1/report.html").as_uri())
    shown = page.locator(".slide:visible")
    assert shown.count() == 1
    before = shown.locator("figcaption").inner_text()
    page.locator(".slides .over.experts").first.wait_for(state="hidden")
    choices = page.locator("input[name=slice]")
    for place in range(choices.count()):
        choices.nth(place).check(force=True)
        assert page.locator(".slide:visible").count() == 1
    assert page.locator(".slide:visible").locator("figcaption").inner_text() != before
    page.get_by_label("Experts").check(force=True)
    assert page.locator(".slide:visible .over.experts").is_visible()
    page.get_by_label("CT only").check(force=True)
    assert not page.locator(".slide:visible .over.experts").is_visible()
    assert not page.locator(".slide:visible .over.organs").is_visible()
    page.context.close()


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_no_page_is_wider_than_the_window(browser: "Browser", batch: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    for name in ("index.html", "cases/1/report.html"):
        page.goto((batch / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
