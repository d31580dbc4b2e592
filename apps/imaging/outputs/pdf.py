"""The report of a case on paper: PDF, and the same encapsulated in DICOM.

The PDF names no patient in either mode: as a DICOM object it carries what its header carries.
"""

from collections.abc import Sequence
from io import BytesIO
from xml.sax.saxutils import escape

from highdicom import SOPClass
from highdicom.sr import CodedConcept
from PIL import Image as PilImage
from pydicom import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.platypus import Flowable, Image, Paragraph, SimpleDocTemplate, Table

from apps.imaging.case import Case
from apps.imaging.finding import Findings, Organ
from apps.imaging.outputs.anatomy import anatomy_of
from apps.imaging.outputs.derived import NOTICE, Derivation
from apps.imaging.outputs.overlay import Rgb
from apps.imaging.outputs.settings import Kind

MARGIN = 18 * mm
INK, MUTED, RULE = (
    colors.HexColor("#1b1f24"),
    colors.HexColor("#59626d"),
    colors.HexColor("#d5d9de"),
)
TITLE = ParagraphStyle("title", fontName="Helvetica-Bold", fontSize=17, leading=21, textColor=INK)
HEAD = ParagraphStyle(
    "head", parent=TITLE, fontSize=11, leading=15, spaceBefore=10, spaceAfter=3, keepWithNext=1
)
BODY = ParagraphStyle("body", fontName="Helvetica", fontSize=9, leading=12.5, textColor=INK)
NOTE = ParagraphStyle("note", parent=BODY, textColor=MUTED)
DOCUMENT_TYPE = Code("18748-4", "LN", "Diagnostic imaging report")
JPEG_QUALITY = 88
MAX_PICTURE = 125 * mm  # fits under the tables of most cases


def pdf_of(case: Case, findings: Findings, montage: Rgb) -> bytes:
    """Return the report as PDF; the same bytes for the same case."""
    buffer = BytesIO()
    document = SimpleDocTemplate(
        buffer,
        pagesize=A4,
        leftMargin=MARGIN,
        rightMargin=MARGIN,
        topMargin=MARGIN,
        bottomMargin=MARGIN,
        title=f"Organ report, case {case.case_id}",
        author="trimoe",
        invariant=1,
    )
    document.build(
        [
            Paragraph("Organ segmentation", TITLE),
            Paragraph(f"<b>{NOTICE}</b>", BODY),
            Paragraph(escape(_facts(case, findings)), NOTE),
            Paragraph("Measurements", HEAD),
            _measurements(findings.organs),
            Paragraph("Repairs", HEAD),
            *_repairs(case),
            Paragraph("Slices", HEAD),
            _picture(montage, document.width),
        ]
    )
    return buffer.getvalue()


def encapsulated(derivation: Derivation, pdf: bytes) -> Dataset:
    """Return a PDF as a DICOM object of the case's study (PS3.3, A.45.1)."""
    document = SOPClass(
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **derivation.patient_and_study(),
        **derivation.identity(Kind.PDF),
    )
    document.ConversionType = "WSD"
    document.BurnedInAnnotation = "NO"
    document.AcquisitionDateTime = ""
    document.DocumentTitle = "Organ report (research use)"
    document.ConceptNameCodeSequence = [CodedConcept.from_code(DOCUMENT_TYPE)]
    document.SourceInstanceSequence = [_reference(header) for header in derivation.references]
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocumentLength = len(pdf)
    document.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    derivation.finish(document)
    return document


def _facts(case: Case, findings: Findings) -> str:
    referred = "below" if findings.is_referred else "above"
    return (
        f"Case {case.case_id}; {case.status.value}; confidence {findings.confidence_case:.2f}, "
        f"{referred} the referral threshold; unusual {findings.unusual:.2f} (1 = the farthest "
        f"validation case); model {findings.model_version}"
    )


def _measurements(organs: Sequence[Organ]) -> Table:
    head = ["Organ", "Volume, ml", "Mean HU", "SD HU", "Confidence", "Certain"]
    rows = [
        [
            anatomy_of(organ.name).title,
            *(
                (f"{organ.volume_ml:.1f}", f"{organ.mean_hu:.0f}", f"{organ.sd_hu:.0f}")
                if organ.box
                else ("not found", "", "")
            ),
            f"{organ.confidence:.2f}",
            "yes" if organ.is_sure else "no",
        ]
        for organ in organs
    ]
    return _table([head, *rows], [43 * mm, *[25 * mm] * 5], right_from=1)


def _repairs(case: Case) -> list[Flowable]:
    if not case.reasons:
        return [Paragraph("None: slices were used as they were read.", BODY)]
    rows = [
        [reason.code, Paragraph(escape(reason.detail), BODY), f"{reason.cost_mm:.2f}"]
        for reason in case.reasons
    ]
    widths = [50 * mm, 96 * mm, 22 * mm]
    return [_table([["Code", "What was done", "Cost, mm"], *rows], widths, right_from=2)]


def _table(rows: Sequence[Sequence[object]], widths: list[float], right_from: int) -> Table:
    return Table(
        rows,
        colWidths=widths,
        repeatRows=1,
        hAlign="LEFT",
        style=[
            ("FONT", (0, 0), (-1, 0), "Helvetica-Bold", 8.5),
            ("FONT", (0, 1), (-1, -1), "Helvetica", 9),
            ("TEXTCOLOR", (0, 0), (-1, 0), MUTED),
            ("TEXTCOLOR", (0, 1), (-1, -1), INK),
            ("ALIGN", (right_from, 0), (-1, -1), "RIGHT"),
            ("VALIGN", (0, 0), (-1, -1), "TOP"),
            ("LINEBELOW", (0, 0), (-1, -1), 0.4, RULE),
            ("LEFTPADDING", (0, 0), (0, -1), 0),
            ("RIGHTPADDING", (-1, 0), (-1, -1), 0),
        ],
    )


def _picture(montage: Rgb, width: float) -> Image:
    buffer = BytesIO()
    PilImage.fromarray(montage).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image(buffer, width, MAX_PICTURE, kind="proportional", hAlign="LEFT")


def _reference(header: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    return item
