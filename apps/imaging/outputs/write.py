"""The door to all outputs: of one case into its directory, of a batch into its own.

The report of a case is the fast part; the files beside it (DICOM, NIfTI, PDF, PNG) take
seconds.  Who is in a hurry calls ``write_report`` first and ``write_files`` later; both take
the same settings, and the report links all that the settings ask for.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from traceback import extract_tb

from pydicom import Dataset

from apps.imaging.case import Case
from apps.imaging.finding import Findings
from apps.imaging.outputs.batch_page import TABLE, WORKLIST, batch_page
from apps.imaging.outputs.capture import capture_of
from apps.imaging.outputs.case_page import Extras, case_page, quarantine_page
from apps.imaging.outputs.derived import Derivation
from apps.imaging.outputs.errors import OutputError
from apps.imaging.outputs.label_map import write_label_map
from apps.imaging.outputs.measurements import measurements_of
from apps.imaging.outputs.montage import montage_of
from apps.imaging.outputs.overlay import picture_of, png_of, rgb_of
from apps.imaging.outputs.pdf import encapsulated, pdf_of
from apps.imaging.outputs.plan import FILES, LAYERS, Plan, overlay_path, plan_of
from apps.imaging.outputs.segmentation import segmentation_of
from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.outputs.table import write_table
from apps.imaging.outputs.worklist import write_worklist

REPORT = FILES[Kind.REPORT]["report"]
BATCH_REPORT = "index.html"


def write_case(
    case: Case, findings: Findings | None, directory: Path, settings: OutputSettings
) -> Mapping[str, str]:
    """Write what the settings ask for of one case.

    Args:
        case: As read.
        findings: On the grid of its slices; None if quarantined: then only the report is
            written, and names the reason.
        directory: Of this case; made if it is missing.
        settings: Kinds of output, and whether they may say who the patient is.

    Returns:
        Paths relative to the directory, by name.

    Raises:
        OutputError: An output could not be written; those before it are there.
    """
    report = write_report(case, findings, directory, settings)
    if findings is None or case.stack is None:
        return report
    return {**report, **write_files(case, findings, directory, settings)}


def write_report(
    case: Case, findings: Findings | None, directory: Path, settings: OutputSettings
) -> Mapping[str, str]:
    """Write the HTML report alone; see ``write_case``."""
    if Kind.REPORT not in settings.kinds:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    try:
        text = _page(case, findings, settings)
    except Exception as error:  # noqa: BLE001 - a library's words may quote a header
        raise _failure(case, Kind.REPORT, error) from None
    (directory / REPORT).write_text(text, encoding="utf-8")
    return {"report": REPORT}


def write_files(
    case: Case, findings: Findings, directory: Path, settings: OutputSettings
) -> Mapping[str, str]:
    """Write everything beside the HTML report; see ``write_case``."""
    directory.mkdir(parents=True, exist_ok=True)
    derivation = Derivation(case, findings, settings)
    plan = plan_of(derivation)
    for kind, write in _WRITERS.items():
        try:
            write(derivation, plan, directory)
        except Exception as error:  # noqa: BLE001 - a library's words may quote a header
            raise _failure(case, kind, error) from None
    return {name: path for name, path in plan.files.items() if name != "report"}


def write_batch(
    summaries: Iterable[CaseSummary], directory: Path, settings: OutputSettings, wall_s: float
) -> Mapping[str, str]:
    """Write the report of a batch, its table and its worklist.

    Args:
        summaries: One per case, their outputs relative to the directory.
        directory: Of the batch; made if it is missing.
        settings: Say whether sources and original UIDs may be named.
        wall_s: How long the batch took.

    Returns:
        Paths relative to the directory, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cases = list(summaries)
    write_table(cases, directory / TABLE, settings)
    write_worklist(cases, directory / WORKLIST, settings)
    (directory / BATCH_REPORT).write_text(batch_page(cases, wall_s, settings), encoding="utf-8")
    return {"batch_report": BATCH_REPORT, "table": TABLE, "worklist": WORKLIST}


def _page(case: Case, findings: Findings | None, settings: OutputSettings) -> str:
    if findings is None or case.stack is None:
        return quarantine_page(case, settings)
    plan = plan_of(Derivation(case, findings, settings))
    files = tuple(path for name, path in plan.files.items() if name != "report")
    extras = Extras(plan.slices, files, plan.notes)
    return case_page(case, case.stack, findings, extras, settings)


def _write_dicom(derivation: Derivation, plan: Plan, directory: Path) -> None:
    if "segmentation" not in plan.files:
        return
    segmentation = segmentation_of(derivation)
    if segmentation is None:
        return
    _save(segmentation, directory / plan.files["segmentation"])
    if "measurements" in plan.files:
        document = measurements_of(derivation, segmentation)
        _save(document, directory / plan.files["measurements"])


def _write_nifti(derivation: Derivation, plan: Plan, directory: Path) -> None:
    if plan.grid is not None:
        write_label_map(derivation.stack, derivation.findings, plan.grid, directory)


def _write_sheets(derivation: Derivation, plan: Plan, directory: Path) -> None:
    """Write what shows the montage: the capture, the PDF and the PDF in DICOM."""
    if not {"capture", "pdf"} & set(plan.files):
        return
    montage = montage_of(derivation.stack, derivation.findings, plan.slices)
    if "capture" in plan.files:
        _save(capture_of(derivation, montage), directory / plan.files["capture"])
    if "pdf" in plan.files:
        pdf = pdf_of(derivation.case, derivation.findings, montage)
        (directory / plan.files["pdf"]).write_bytes(pdf)
        if "pdf_dicom" in plan.files:
            _save(encapsulated(derivation, pdf), directory / plan.files["pdf_dicom"])


def _write_overlays(derivation: Derivation, plan: Plan, directory: Path) -> None:
    if Kind.OVERLAYS not in derivation.settings.kinds:
        return
    (directory / "overlays").mkdir(exist_ok=True)
    for index in plan.slices:
        picture = picture_of(derivation.stack, derivation.findings, index)
        grey = rgb_of(picture.grey)
        for name in LAYERS:
            shown = getattr(picture, name).over(grey)
            (directory / overlay_path(index, name)).write_bytes(png_of(shown))


_WRITERS = {
    Kind.SEGMENTATION: _write_dicom,
    Kind.NIFTI: _write_nifti,
    Kind.CAPTURE: _write_sheets,
    Kind.OVERLAYS: _write_overlays,
}


def _save(dataset: Dataset, path: Path) -> None:
    dataset.save_as(path, enforce_file_format=True)


def _failure(case: Case, kind: Kind, error: Exception) -> OutputError:
    place = extract_tb(error.__traceback__)[-1]
    message = f"case {case.case_id}: expected to write its {kind.value}, got "
    message += f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return OutputError(message + "; leave that kind out of the settings, or look at its headers")
