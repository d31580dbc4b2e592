"""The organs of the segmentation task: codes for DICOM, names and colours for people."""

from dataclasses import dataclass
from types import MappingProxyType

from pydicom.sr.coding import Code

CATEGORY = Code("123037004", "SCT", "Anatomical Structure")
RIGHT = Code("24028007", "SCT", "Right")
LEFT = Code("7771000", "SCT", "Left")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """How an organ is named.

    Args:
        title: For people.
        code: In SNOMED CT.
        laterality: None where there is one such organ.
        colour: Red, green, blue, 0 to 255; told apart by colour-blind eyes, bright on CT.
    """

    title: str
    code: Code
    laterality: Code | None
    colour: tuple[int, int, int]


_PAROTID = Code("45289007", "SCT", "Parotid gland")

ANATOMY = MappingProxyType(
    {
        "Brainstem": Anatomy(
            "Brainstem", Code("15926001", "SCT", "Brainstem"), None, (86, 180, 233)
        ),
        "SpinalCord": Anatomy(
            "Spinal cord", Code("2748008", "SCT", "Spinal cord"), None, (240, 228, 66)
        ),
        "RightParotid": Anatomy("Right parotid", _PAROTID, RIGHT, (0, 190, 140)),
        "LeftParotid": Anatomy("Left parotid", _PAROTID, LEFT, (230, 159, 0)),
        "Esophagus": Anatomy(
            "Esophagus", Code("32849002", "SCT", "Esophagus"), None, (255, 112, 67)
        ),
        "Larynx": Anatomy("Larynx", Code("4596009", "SCT", "Larynx"), None, (226, 135, 190)),
        "Mandible": Anatomy("Mandible", Code("91609006", "SCT", "Mandible"), None, (134, 158, 255)),
    }
)


def anatomy_of(name: str) -> Anatomy:
    """Return how an organ is named.

    Raises:
        ValueError: It is none of the task's.
    """
    if name not in ANATOMY:
        message = f"expected one of {', '.join(ANATOMY)}, got {name!r:.40}; "
        raise ValueError(message + "give the organ a code in apps/imaging/outputs/anatomy.py")
    return ANATOMY[name]
