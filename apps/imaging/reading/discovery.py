"""Finds the cases of an input from headers alone.

Rules:
    1. The CT slices of one series in one folder are a case; so is each NIfTI file.
    2. Two acquisitions in one series that lie at the same places are two cases.
    3. Localisers, other objects and foreign files are set aside, as are series of too few slices
       beside one that has enough.
    4. A place without places below it, of which no case comes, is a source that will read as
       quarantined; so is an input of which none comes.
    5. A file that claims to be DICOM and cannot be grouped may be a lost slice: the series
       beside it are not simply correct.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from apps.imaging.reading.archives import MemberReader, read_from
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.headers import (
    CT_CLASSES,
    GROUPING_TAGS,
    HEAD_BYTES,
    class_of,
    is_dicom,
    position_of,
    read_header,
    text_of,
    whole_number,
)
from apps.imaging.reading.nifti import SUFFIXES as NIFTI_SUFFIXES
from apps.imaging.reading.places import Place, walk
from apps.imaging.reading.source import (
    Inventory,
    Member,
    RejectedError,
    SetAside,
    Source,
    SourceKind,
    case_id_of,
    reason_of,
)
from apps.imaging.reasons import Reason

LOST_SLICE = ("FILE_TRUNCATED", "FILE_UNREADABLE")  # of a file that may have been one
PLACE_DIGITS = 1  # tenths of a millimetre tell places of slices apart

_FOREIGN = Reason("FOREIGN_FILE", "expected DICOM, NIfTI or zip, got another kind of file")
_EMPTY_FILE = Reason("FILE_TRUNCATED", "expected a DICOM file, the file is empty")
_CUT_HEADER = Reason("FILE_TRUNCATED", "expected a whole DICOM header, the file ends in it")
_NO_CT_OBJECT = Reason("NOT_CT_IMAGE", "expected a CT image, got another kind of DICOM object")
_NOT_CT = Reason("MODALITY_NOT_CT", "expected modality CT, got another")
_LOCALISER = Reason("LOCALISER", "a localiser, no slice of a volume")
_FEW_SLICES = Reason("TOO_FEW_SLICES", "expected a volume, got few slices beside one")
_NO_FILES = Reason("PLACE_EMPTY", "expected a CT series, there is no file")


@dataclass(frozen=True, slots=True)
class _Image:
    """What a CT slice is grouped by."""

    member: Member
    study_uid: str
    series_uid: str
    series_number: str
    frame_of_reference: str
    acquisition: str
    num_slices: int
    position: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class _Series:
    images: tuple[_Image, ...]
    part: str = ""


def discover(root: Path, bounds: Bounds) -> Inventory:
    """Return the cases of an input, and the files of none.

    Args:
        root: A folder, a zip archive, or a single DICOM or NIfTI file.
        bounds: Limits of archives and headers.

    Raises:
        FileNotFoundError: There is nothing at ``root``.
    """
    if not root.exists():
        message = "expected a folder or file as input, there is none of that name"
        raise FileNotFoundError(message)
    sources: list[Source] = []
    set_aside: list[SetAside] = []
    with warnings.catch_warnings(action="ignore"), MemberReader(bounds) as reader:
        for place in walk(root, reader, bounds):
            sources += _sources_of(place, reader, bounds)
            set_aside += place.set_aside
    if not sources:
        sources.append(_without_case(".", set_aside))
    return Inventory(
        tuple(sorted(sources, key=lambda source: (source.label, source.case_id))),
        tuple(sorted(set_aside, key=lambda aside: (aside.label, aside.reason.code))),
    )


def _sources_of(place: Place, reader: MemberReader, bounds: Bounds) -> list[Source]:
    """Return the cases of one place; its other files are added to ``place.set_aside``."""
    sources: list[Source] = []
    images: list[_Image] = []
    for member in place.members:
        if member.name.lower().endswith(NIFTI_SUFFIXES):
            sources.append(_volume_source(place, member))
            continue
        try:
            images.append(_image(member, reader, bounds))
        except Exception as error:  # noqa: BLE001 - one file never takes others with it
            place.put_aside(member.name, reason_of(error))
    lost = _lost_slices(place, images)
    series = _without_scouts(_grouped(images), place, bounds)
    sources += [_series_source(place, each, lost) for each in series]
    if place.is_leaf and not sources:
        sources.append(_without_case(place.label, place.set_aside))
    return sources


def _without_scouts(series: list[_Series], place: Place, bounds: Bounds) -> list[_Series]:
    """Return the series but those of few slices beside one that has enough."""
    whole = [s for s in series if sum(i.num_slices for i in s.images) >= bounds.min_slices]
    if not whole:
        return series
    for each in series:
        if each not in whole:
            for image in each.images:
                place.put_aside(image.member.name, _FEW_SLICES)
    return whole


def _image(member: Member, reader: MemberReader, bounds: Bounds) -> _Image:
    """Return what a CT slice is grouped by.

    Raises:
        RejectedError: It is none.
    """
    with reader.open(member) as stream:
        head = read_from(stream, HEAD_BYTES)
        if not head:
            raise _rejected(_EMPTY_FILE)
        if not is_dicom(head):
            raise _rejected(_FOREIGN)
        stream.seek(0)
        header = read_header(stream, bounds, GROUPING_TAGS)
    sop_class = class_of(header)
    if not sop_class or (sop_class in CT_CLASSES and "Rows" not in header):
        raise _rejected(_CUT_HEADER)
    if text_of(header, "Modality") not in ("", "CT") and "Rows" in header:
        raise _rejected(_NOT_CT)
    if sop_class not in CT_CLASSES:
        raise _rejected(_NO_CT_OBJECT)
    if "LOCALIZER" in text_of(header, "ImageType"):
        raise _rejected(_LOCALISER)
    return _Image(
        member=member,
        study_uid=text_of(header, "StudyInstanceUID"),
        series_uid=text_of(header, "SeriesInstanceUID"),
        series_number=text_of(header, "SeriesNumber"),
        frame_of_reference=text_of(header, "FrameOfReferenceUID"),
        acquisition=text_of(header, "AcquisitionNumber"),
        num_slices=whole_number(header, "NumberOfFrames", 1),
        position=position_of(header),
    )


def _grouped(images: Iterable[_Image]) -> list[_Series]:
    """Return the series of a place, and what has no series UID with what it belongs to."""
    by_uid: defaultdict[str, list[_Image]] = defaultdict(list)
    orphans: defaultdict[tuple[str, ...], list[_Image]] = defaultdict(list)
    for image in images:
        if image.series_uid:
            by_uid[image.series_uid].append(image)
        else:
            orphans[_kinship(image)].append(image)
    groups: list[_Series] = []
    for kinship, group in orphans.items():
        kin = [uid for uid, members in by_uid.items() if _kinship(members[0]) == kinship]
        if len(kin) == 1:
            by_uid[kin[0]] += group
        else:
            groups.append(_Series(tuple(group), part="\0".join(kinship)))
    for group in by_uid.values():
        groups += _acquisitions(group)
    return groups


def _kinship(image: _Image) -> tuple[str, ...]:
    return image.study_uid, image.frame_of_reference, image.series_number


def _acquisitions(images: list[_Image]) -> list[_Series]:
    """Return a series as one, or by acquisition if each of them covers the same places once."""
    by_number: defaultdict[str, list[_Image]] = defaultdict(list)
    for image in images:
        by_number[image.acquisition].append(image)
    places = [{_place(image) for image in group} for group in by_number.values()]
    is_single = [len(p) == len(group) for p, group in zip(places, by_number.values(), strict=True)]
    shared = set.intersection(*places) if len(places) > 1 else set()
    if None in shared or 2 * len(shared) <= max(map(len, places)) or not all(is_single):
        return [_Series(tuple(images))]
    return [_Series(tuple(group), part=number) for number, group in sorted(by_number.items())]


def _place(image: _Image) -> tuple[float, ...] | None:
    if image.position is None:
        return None
    return tuple(round(value, PLACE_DIGITS) for value in image.position)


def _lost_slices(place: Place, images: list[_Image]) -> tuple[Reason, ...]:
    """Return reasons if files of the place may have been slices of its series."""
    suffixes = {Path(image.member.name).suffix.lower() for image in images}
    lost = Counter(
        aside.reason.code
        for aside in place.set_aside
        if aside.reason.code in LOST_SLICE and Path(aside.label).suffix.lower() in suffixes
    )
    text = "files beside the series cannot be read as far as to say what they are; set aside"
    return tuple(Reason(code, f"{num} {text}") for code, num in sorted(lost.items()))


def _volume_source(place: Place, member: Member) -> Source:
    label = place.label_of(member.name)
    return Source(case_id_of(label, ""), label, "", SourceKind.NIFTI, (member,))


def _series_source(place: Place, series: _Series, lost: tuple[Reason, ...]) -> Source:
    uid = next((image.series_uid for image in series.images if image.series_uid), "")
    return Source(
        case_id_of(place.label, uid, series.part),
        place.label,
        uid,
        SourceKind.DICOM,
        tuple(image.member for image in series.images),
        lost,
    )


def _without_case(label: str, set_aside: list[SetAside]) -> Source:
    """Return a source that says why no case comes of a place."""
    counts = Counter(aside.reason for aside in set_aside)
    reason = max(counts, key=lambda r: (r.code != _FOREIGN.code, counts[r]), default=_NO_FILES)
    if counts:
        detail = f"no CT series among {len(set_aside)} files: {reason.detail}"
        reason = replace(reason, detail=detail)
    return Source(case_id_of(label, ""), label, "", SourceKind.NOTHING, (), (reason,))


def _rejected(reason: Reason) -> RejectedError:
    return RejectedError(reason.code, reason.detail)
