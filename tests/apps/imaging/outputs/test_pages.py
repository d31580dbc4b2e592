"""The HTML reports: what they say, and that they need nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import CaseSummary, summarise
from apps.imaging.outputs.write import write_batch, write_report
from apps.imaging.reasons import Reason, Status
from tests.apps.imaging.outputs.conftest import Written
from tests.apps.imaging.outputs.scan import Sample

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def case_page(written: Written) -> Page:
    return Page((written.directory / written.outputs["report"]).read_text())


def batch_page(summaries: list[CaseSummary], directory: Path, settings: OutputSettings) -> Page:
    outputs = write_batch(summaries, directory, settings, 36.0)
    return Page((directory / outputs["batch_report"]).read_text())


def test_a_case_page_loads_nothing_and_links_only_files_beside_it(written_filled: Written) -> None:
    page, directory = case_page(written_filled), written_filled.directory
    assert page.open == []
    assert not page.all("script")
    sources = [image["src"] or "" for image in page.all("img")]
    assert len(sources) > 8
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    links = [link["href"] or "" for link in page.all("a")]
    assert len(links) > 8
    assert all((directory / link).is_file() for link in links)
    assert "http:" not in (directory / "report.html").read_text()
    assert "https:" not in (directory / "report.html").read_text()


def test_a_case_page_says_what_a_reviewer_needs(written_filled: Written) -> None:
    text = " ".join(case_page(written_filled).text.split())
    organ = next(o for o in written_filled.sample.findings.organs if o.name == "Mandible")
    for expected in (
        "case-0001", "repaired", "GAP_INTERPOLATED", "slice filled in between its neighbours",
        "1.50", "0.87", "organs-test-1", "infer 2.10 s", "Together 2.70 s", "global experts",
        "local experts", f"{organ.volume_ml:.1f}", f"{organ.mean_hu:.0f}", "not found",
        "2 filled in", "Research use. Not a medical device.",
    ):  # fmt: skip
        assert expected in text, expected


def test_pictures_and_tables_can_be_read_aloud(written_filled: Written) -> None:
    page = case_page(written_filled)
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in {"col", "row"} for cell in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_what_a_reason_says_is_text_and_never_markup(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    reason = Reason("X", "<script>alert(1)</script>")
    case = replace(plain.case, reasons=(reason,))
    outputs = write_report(case, plain.findings, tmp_path, settings)
    page = Page((tmp_path / outputs["report"]).read_text())
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text


@pytest.fixture
def summaries(filled: Sample, plain: Sample) -> list[CaseSummary]:
    """Three cases: repaired, correct, quarantined."""
    repaired = summarise(
        filled.case, filled.findings, {"report": "cases/a b#1/report.html"}, {"read": 2.0}
    )
    correct = replace(
        summarise(plain.case, plain.findings, {}, {"read": 4.0, "infer": 1.0}), case_id="case-0002"
    )
    broken = CaseSummary(
        "case-0003", "in/3", "", Status.QUARANTINED, (Reason("NO_PIXELS", "none"),)
    )
    return [correct, repaired, broken]


def test_a_batch_page_counts_orders_and_links(
    summaries: list[CaseSummary], tmp_path: Path, settings: OutputSettings
) -> None:
    page = batch_page(summaries, tmp_path, settings)
    text = " ".join(page.text.split())
    assert page.open == []
    assert "Cases per hour 300" in text
    assert "Quarantined 1" in text
    worklist = text[text.index("In the order of review") :]
    places = [worklist.index(f"case-000{number}") for number in (3, 1, 2)]
    assert places == sorted(places)
    assert "cases/a%20b%231/report.html" in [link["href"] for link in page.all("a")]
    assert "NO_PIXELS" in text[: text.index("In the order of review")]
    assert "Research use. Not a medical device." in text


def test_an_empty_batch_has_a_page(tmp_path: Path, settings: OutputSettings) -> None:
    assert "0 cases" in batch_page([], tmp_path, settings).text
