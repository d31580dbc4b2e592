"""Summaries, the table and the order of review."""

import csv
import json
from dataclasses import replace
from pathlib import Path

from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import CaseSummary, summarise
from apps.imaging.outputs.table import write_table
from apps.imaging.outputs.worklist import review_order, uncertainty, why, write_worklist
from apps.imaging.reasons import Reason, Status
from tests.apps.imaging.outputs.scan import KEY, UID_ROOT, Sample


def summary_of(sample: Sample) -> CaseSummary:
    return summarise(sample.case, sample.findings, {"report": "cases/1/report.html"}, {"read": 0.5})


def quarantined(name: str) -> CaseSummary:
    reason = Reason("NOT_CT", "modality MR")
    return CaseSummary(name, f"in/{name}", "", Status.QUARANTINED, (reason,))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_summary_survives_strict_json(filled: Sample) -> None:
    summary = summary_of(filled)
    text = json.dumps(summary.as_json(), allow_nan=False)
    back = CaseSummary.from_json(json.loads(text))
    assert json.dumps(back.as_json()) == text
    assert back.organs[0] == summary.organs[0]
    assert back.reasons == summary.reasons
    assert back.slice_positions_mm == tuple(filled.stack.positions_mm.round(4).tolist())
    empty = next(organ for organ in back.organs if organ.name == "Larynx")
    assert empty.box is None
    assert empty.mean_hu != empty.mean_hu
    assert CaseSummary.from_json(quarantined("a").as_json()) == quarantined("a")


def test_review_goes_by_status_then_uncertainty_then_doubtful_organs(plain: Sample) -> None:
    base = summary_of(plain)
    sure = tuple(replace(organ, is_sure=True, box=(0,) * 6) for organ in base.organs)
    doubtful = (replace(sure[0], is_sure=False), *sure[1:])
    cases = [
        replace(base, case_id="sure", organs=sure, confidence_case=0.951),
        replace(base, case_id="doubt", organs=doubtful, confidence_case=0.949),
        replace(base, case_id="low", organs=sure, confidence_case=0.6),
        replace(base, case_id="far", organs=sure, confidence_case=0.99, unusual=1.3),
        replace(base, case_id="fixed", organs=sure, confidence_case=0.97, status=Status.REPAIRED),
        quarantined("broken"),
    ]
    order = [summary.case_id for summary in review_order(reversed(cases))]
    assert order == ["broken", "fixed", "far", "low", "doubt", "sure"]


def test_far_from_the_training_data_is_wholly_uncertain(plain: Sample) -> None:
    summary = summary_of(plain)
    assert uncertainty(summary) == 0.13
    assert uncertainty(replace(summary, unusual=1.01)) == 1.0
    assert uncertainty(quarantined("a")) == 1.0


def test_the_line_says_what_to_look_at(filled: Sample) -> None:
    summary = replace(summary_of(filled), is_referred=True, unusual=1.2)
    assert why(summary) == (
        "GAP_INTERPOLATED; unlike the training data (1.20); below the referral threshold; "
        "in doubt: Esophagus, Larynx"
    )
    assert why(quarantined("a")) == "NOT_CT"


def test_the_table_has_a_row_for_each_organ_and_one_for_a_quarantined_case(
    filled: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    summary = summary_of(filled)
    write_table([summary, quarantined("q")], tmp_path / "t.csv", settings)
    rows = rows_of(tmp_path / "t.csv")
    assert [row["organ"] for row in rows] == [o.name for o in summary.organs] + [""]
    for row, organ in zip(rows, summary.organs, strict=False):
        assert float(row["volume_ml"]) == round(organ.volume_ml, 4)
        assert row["mean_hu"] == ("" if organ.box is None else str(round(organ.mean_hu, 4)))
    assert rows[0]["cost_mm"] == "1.5"
    assert rows[-1]["status"] == "quarantined"


def test_sources_and_series_are_told_only_with_identity(plain: Sample, tmp_path: Path) -> None:
    write_table([summary_of(plain)], tmp_path / "a.csv", OutputSettings(KEY))
    write_table([summary_of(plain)], tmp_path / "b.csv", OutputSettings(KEY, keep_identity=True))
    hidden, told = rows_of(tmp_path / "a.csv")[0], rows_of(tmp_path / "b.csv")[0]
    assert (hidden["source"], told["source"]) == ("", "SENTINELSOURCE/ct")
    assert told["series_uid"] == f"{UID_ROOT}.2"
    assert hidden["series_uid"].startswith("2.25.")


def test_text_never_becomes_a_formula(plain: Sample, tmp_path: Path) -> None:
    summary = replace(summary_of(plain), source="=HYPERLINK(1)", organs=())
    settings = OutputSettings(KEY, keep_identity=True)
    write_table([summary], tmp_path / "t.csv", settings)
    write_worklist([summary], tmp_path / "w.csv", settings)
    assert rows_of(tmp_path / "t.csv")[0]["source"] == "'=HYPERLINK(1)"
    assert rows_of(tmp_path / "w.csv")[0]["source"] == "'=HYPERLINK(1)"


def test_the_worklist_file_is_in_order(
    plain: Sample, tmp_path: Path, settings: OutputSettings
) -> None:
    write_worklist([summary_of(plain), quarantined("q")], tmp_path / "w.csv", settings)
    rows = rows_of(tmp_path / "w.csv")
    assert [(row["place"], row["case_id"]) for row in rows] == [("1", "q"), ("2", "case-0001")]
    assert rows[1]["report"] == "cases/1/report.html"
    assert rows[1]["doubtful_organs"] == "2"
