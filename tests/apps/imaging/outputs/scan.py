"""A generated CT with organs, as a case in the forms that a scanner may give it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import CTImageStorage

from apps.imaging.case import Case
from apps.imaging.finding import Findings, Organ
from apps.imaging.reasons import Reason, Status
from apps.imaging.stack import SliceStack

KEY = bytes(range(32))
UID_ROOT = "1.2.826.0.1.3680043.8.498.4711"
SHAPE = (20, 48, 56)  # slices, rows, columns
PIXEL_MM = (1.6, 1.2)  # rows and columns differ, so a swap shows
ORIGIN_MM = np.array([-33.6, -38.4, -30.0])

# Organ: label, HU, centre and radii in slices, rows, columns.  The larynx is not there.
ORGANS: Mapping[str, tuple[int, float, tuple[float, ...], tuple[float, ...]]] = {
    "Brainstem": (1, 35.0, (16, 22, 28), (3, 4, 4)),
    "SpinalCord": (2, 30.0, (8, 30, 28), (7.6, 2.5, 2.5)),
    "RightParotid": (3, -10.0, (14, 20, 12), (3, 5, 3)),
    "LeftParotid": (4, -10.0, (14, 20, 44), (3, 5, 3)),
    "Esophagus": (5, 20.0, (3, 24, 28), (2.4, 3, 3)),
    "Mandible": (7, 900.0, (11, 8, 28), (2.5, 3, 12)),
}

IDENTITY: Mapping[str, str] = {
    "PatientName": "Sentinelname^Greta",
    "PatientID": "SENTINEL-ID-77",
    "PatientBirthDate": "19410607",
    "PatientSex": "F",
    "PatientAge": "083Y",
    "PatientAddress": "Sentinelstreet 5",
    "OtherPatientIDs": "SENTINEL-OTHER",
    "AccessionNumber": "ACC-SENTINEL",
    "StudyID": "STUDY-SENTINEL",
    "StudyDate": "19770314",
    "StudyTime": "112233",
    "SeriesDate": "19770315",
    "AcquisitionDate": "19770316",
    "ContentDate": "19770317",
    "StudyDescription": "Sentinel study text",
    "SeriesDescription": "Sentinel series text",
    "ProtocolName": "Sentinel protocol",
    "InstitutionName": "Sentinel Hospital",
    "InstitutionAddress": "Sentinel Square",
    "StationName": "SENTINELSTATION",
    "DeviceSerialNumber": "SN-SENTINEL",
    "ReferringPhysicianName": "Sentinelphys^Ole",
    "OperatorsName": "Sentineloperator^Ida",
    "PatientComments": "Sentinel comment",
}


@dataclass(frozen=True)
class Sample:
    """A case with what a model might have found."""

    case: Case
    findings: Findings

    @property
    def stack(self) -> SliceStack:
        assert self.case.stack is not None
        return self.case.stack


def ellipsoid(
    shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]
) -> NDArray[np.bool_]:
    grids = np.ogrid[tuple(slice(0, size) for size in shape)]
    total = sum(((g - c) / r) ** 2 for g, c, r in zip(grids, centre, radii, strict=True))
    return np.asarray(total <= 1.0)


def scan() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return HU and labels."""
    rng = np.random.default_rng(3)
    hu = np.full(SHAPE, -1000.0)
    hu[ellipsoid(SHAPE, (10, 24, 28), (30, 21, 24))] = 45.0
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for label, value, centre, radii in ORGANS.values():
        inside = ellipsoid(SHAPE, centre, radii)
        hu[inside], labels[inside] = value, label
    hu += rng.normal(0.0, 12.0, SHAPE)
    return hu.round().astype(np.int16), labels


def organ_of(name: str, label: int, hu: NDArray[np.int16], labels: NDArray[np.uint8]) -> Organ:
    where = np.argwhere(labels == label)
    if not len(where):
        return Organ(name, label, 0.0, float("nan"), float("nan"), None, 0.2, False)
    first, last = where.min(axis=0), where.max(axis=0) + 1
    values = hu[labels == label].astype(np.float64)
    return Organ(
        name=name,
        label=label,
        volume_ml=len(where) * PIXEL_MM[0] * PIXEL_MM[1] * 3.0 / 1000.0,
        mean_hu=float(values.mean()),
        sd_hu=float(values.std()),
        box=(int(first[0]), int(first[1]), int(first[2]), int(last[0]), int(last[1]), int(last[2])),
        confidence=0.9 + 0.01 * label,
        is_sure=name != "Esophagus",
    )


def findings_of(hu: NDArray[np.int16], labels: NDArray[np.uint8]) -> Findings:
    names = {name: entry[0] for name, entry in ORGANS.items()} | {"Larynx": 6}
    confidence = np.where(labels > 0, 230, 250).astype(np.uint8)
    confidence[9] = 140  # the least certain slice
    share = np.broadcast_to(np.linspace(0, 255, SHAPE[2]).astype(np.uint8), SHAPE)
    return Findings(
        labels=labels,
        confidence=confidence,
        local_share=np.ascontiguousarray(share),
        organs=tuple(
            organ_of(name, label, hu, labels)
            for name, label in sorted(names.items(), key=lambda entry: entry[1])
        ),
        unusual=0.4,
        confidence_case=0.87,
        is_referred=False,
        model_version="organs-test-1",
        seconds={"read": 0.4, "resample": 0.2, "infer": 2.1},
    )


def header_of(index: int, stack: SliceStack) -> Dataset:
    header = Dataset()
    for keyword, value in IDENTITY.items():
        setattr(header, keyword, value)
    header.SOPClassUID = CTImageStorage
    header.SOPInstanceUID = f"{UID_ROOT}.3.{index + 1}"
    header.StudyInstanceUID, header.SeriesInstanceUID = f"{UID_ROOT}.1", f"{UID_ROOT}.2"
    header.FrameOfReferenceUID = f"{UID_ROOT}.4"
    header.Modality = "CT"
    header.Rows, header.Columns = SHAPE[1:]
    header.PixelSpacing = list(PIXEL_MM)
    header.ImageOrientationPatient = [*stack.row_axis.tolist(), *stack.column_axis.tolist()]
    header.ImagePositionPatient = stack.origins_mm[index].tolist()
    header.SliceThickness = 3.0
    block = header.private_block(0x0041, "SENTINEL CREATOR", create=True)
    block.add_new(0x01, "LO", "Sentinel private")
    return header


def stack_of(
    hu: NDArray[np.int16], steps_mm: NDArray[np.float64], tilt_deg: float, filled: tuple[int, ...]
) -> SliceStack:
    """Return slices that the table moved along the body by ``steps_mm``, seen by a tilted gantry."""
    cosine, sine = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))
    table_mm = np.concatenate([[0.0], np.cumsum(steps_mm)])
    is_interpolated = np.zeros(len(hu), dtype=np.bool_)
    is_interpolated[list(filled)] = True
    return SliceStack(
        hu=hu,
        origins_mm=ORIGIN_MM + table_mm[:, None] * np.array([0.0, 0.0, 1.0]),
        row_axis=np.array([1.0, 0.0, 0.0]),
        column_axis=np.array([0.0, cosine, sine]),
        pixel_mm=PIXEL_MM,
        is_interpolated=is_interpolated,
    )


def sample_of(
    *, steps_mm: NDArray[np.float64], tilt_deg: float = 0.0, filled: tuple[int, ...] = ()
) -> Sample:
    hu, labels = scan()
    stack = stack_of(hu, steps_mm, tilt_deg, filled)
    reasons = [Reason("GAP_INTERPOLATED", "slice filled in between its neighbours", 1.5)] * bool(
        filled
    )
    if tilt_deg:
        reasons.append(Reason("GANTRY_TILT", f"tilt of {tilt_deg:.1f} degrees kept"))
    case = Case(
        case_id="case-0001",
        source="SENTINELSOURCE/ct",
        series_uid=f"{UID_ROOT}.2",
        status=Status.REPAIRED if reasons else Status.CORRECT,
        reasons=tuple(reasons),
        stack=stack,
        headers=tuple(
            None if index in filled else header_of(index, stack) for index in range(len(hu))
        ),
    )
    return Sample(case, findings_of(hu, labels))


EVEN = np.full(SHAPE[0] - 1, 3.0)
UNEVEN = np.where(np.arange(SHAPE[0] - 1) < 9, 4.0, 7.0)
FORMS: Mapping[str, Callable[[], Sample]] = {
    "plain": lambda: sample_of(steps_mm=EVEN),
    "tilted": lambda: sample_of(steps_mm=EVEN, tilt_deg=18.5),
    "filled": lambda: sample_of(steps_mm=EVEN, filled=(9, 10)),
    "uneven": lambda: sample_of(steps_mm=UNEVEN),
}
