"""How much of an input is read at most, and how much of a series may be missing."""

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of reading.

    Args:
        archive_depth: Archives inside each other; 1 reads none inside another.
        archive_members: Members of an archive with all archives inside it.
        archive_bytes: Bytes it all expands to, by its directories.
        archive_ratio: Expanded by packed size, where it expands to more than
            ``archive_free_bytes``; deflate reaches 1,030, a CT series 2 to 5, label maps 300.
        archive_free_bytes: See there.
        file_bytes: Of one file, or of one member of an archive when expanded.
        rows: Of a slice; the same for columns.
        slices: Of a series.
        voxels: Of a volume; 2 bytes each, and as much again while it is read.
        min_slices: Fewer give no step to check.
        gap_mm: Widest distance of neighbours between which missing slices are filled in.
        lost_share: Share of a series' slices that may be set aside, or filled in; one always may.
    """

    archive_depth: int = 3
    archive_members: int = 200_000
    archive_bytes: int = 64 * GIB
    archive_ratio: float = 500.0
    archive_free_bytes: int = 64 * MIB
    file_bytes: int = 2 * GIB
    rows: int = 4096
    slices: int = 5000
    voxels: int = GIB
    min_slices: int = 3
    gap_mm: float = 15.0
    lost_share: float = 0.2
