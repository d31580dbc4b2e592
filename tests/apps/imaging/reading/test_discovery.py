"""Which cases an input holds, under which names, and in which order."""

import copy
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reading.source import Inventory, SourceKind
from apps.imaging.reasons import Status
from tests.apps.imaging.reading import faults
from tests.apps.imaging.reading.faults import Slices, files, packed, write_all


@pytest.fixture(scope="module")
def slices() -> Slices:
    return faults.generated_slices()[:4]


@pytest.fixture
def mixed(slices: Slices, tmp_path: Path) -> Path:
    """A folder of DICOM, zips in zips, NIfTI, and places without a case."""
    root = tmp_path / "input"
    write_all(slices, root / "b" / "series")
    (root / "a.zip").write_bytes(packed({
        **files(slices, "x/"), "y/inner.ZIP": packed({**files(slices, ""), "notes.txt": b"."}),
        "z/": b"",
    }))  # fmt: skip
    nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_filename(root / "b" / "ct.nii")
    (root / "empty").mkdir()
    (root / "b" / "readme.txt").write_text("beside")
    return root


def labels(inventory: Inventory) -> list[tuple[str, str]]:
    return [(source.label, source.kind.value) for source in inventory.sources]


def test_every_place_has_its_cases_or_says_why_not(mixed: Path) -> None:
    inventory = discover(mixed, Bounds())
    assert labels(inventory) == [
        ("a.zip!/x", "dicom"),
        ("a.zip!/y/inner.ZIP", "dicom"),
        ("a.zip!/z", "nothing"),
        ("b/ct.nii", "nifti"),
        ("b/series", "dicom"),
        ("empty", "nothing"),
    ]
    aside = [(each.label, each.reason.code) for each in inventory.set_aside]
    assert aside == [
        ("a.zip!/y/inner.ZIP!/notes.txt", "FOREIGN_FILE"),
        ("b/readme.txt", "FOREIGN_FILE"),
    ]
    cases = [read_case(source, Bounds()) for source in inventory.sources]
    assert [case.status for case in cases].count(Status.CORRECT) == 3


def test_sources_are_the_same_over_runs_and_travel(mixed: Path) -> None:
    first, second = discover(mixed, Bounds()), discover(mixed, Bounds())
    assert first == second
    assert pickle.loads(pickle.dumps(first)) == first
    ids = [source.case_id for source in first.sources]
    assert len(set(ids)) == len(ids)
    moved = mixed.rename(mixed.with_name("moved"))
    assert [source.case_id for source in discover(moved, Bounds()).sources] == ids


def test_ids_reveal_nothing(mixed: Path) -> None:
    for source in discover(mixed, Bounds()).sources:
        assert len(source.case_id) == 16
        assert int(source.case_id, 16) >= 0
        assert source.series_uid not in source.case_id or not source.series_uid


def test_headers_do_not_carry_their_files(mixed: Path) -> None:
    source = next(s for s in discover(mixed, Bounds()).sources if s.label == "b/series")
    case = read_case(source, Bounds())
    for header in case.headers:
        assert header is not None
        assert str(mixed).encode() not in pickle.dumps(header)
        assert len(pickle.dumps(header)) < 20_000
        assert header.PatientName == "Nobody^Known"  # outputs decide what to leave out


@pytest.mark.parametrize("name", ["ct.zip", "slice.dcm", "ct.nii.gz"])
def test_a_single_file_is_an_input(name: str, slices: Slices, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "ct.zip":
        path.write_bytes(packed(files(slices, "")))
    elif name == "slice.dcm":
        path.write_bytes(files(slices, "")["0.dcm"])
    else:
        nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_filename(path)
    (source,) = discover(path, Bounds()).sources
    assert source.kind is not SourceKind.NOTHING


def test_no_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder or file"):
        discover(tmp_path / "nothing", Bounds())


def test_folders_that_only_link_to_each_other_give_one_case(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(tmp_path / other, target_is_directory=True)
    inventory = discover(tmp_path, Bounds())
    assert [source.kind for source in inventory.sources] == [SourceKind.NOTHING]


@pytest.mark.parametrize(
    ("bounds", "code"),
    [
        (Bounds(archive_members=3), "ARCHIVE_TOO_MANY_MEMBERS"),
        (Bounds(archive_bytes=10_000), "ARCHIVE_TOO_LARGE"),
        (Bounds(archive_ratio=1.0, archive_free_bytes=1000), "ARCHIVE_RATIO"),
        (Bounds(archive_depth=0), "ARCHIVE_TOO_DEEP"),
        (Bounds(file_bytes=1000), "FILE_TOO_LARGE"),
        (Bounds(rows=31), "SLICE_TOO_LARGE"),
        (Bounds(voxels=32 * 32 * 3), "SERIES_TOO_LARGE"),
        (Bounds(slices=3), "SERIES_TOO_LARGE"),
        (Bounds(min_slices=5), "TOO_FEW_SLICES"),
    ],
)
def test_bounds_hold(bounds: Bounds, code: str, slices: Slices, tmp_path: Path) -> None:
    (tmp_path / "ct.zip").write_bytes(packed(files(slices)))
    (source,) = discover(tmp_path, bounds).sources
    case = read_case(source, bounds)
    assert case.status is Status.QUARANTINED
    assert case.reasons[0].code == code


def test_all_archives_inside_one_share_its_allowance(slices: Slices, tmp_path: Path) -> None:
    inner = packed(files(slices))  # 4 members
    (tmp_path / "ct.zip").write_bytes(packed({"1.zip": inner, "2.zip": inner}))
    sources = discover(tmp_path, Bounds(archive_members=6)).sources
    assert [source.kind.value for source in sources] == ["dicom", "nothing"]
    assert sources[1].reasons[0].code == "ARCHIVE_TOO_MANY_MEMBERS"


def test_a_member_gives_no_more_than_its_directory_says(slices: Slices, tmp_path: Path) -> None:
    """A directory that understates a member's size makes it unreadable, not large."""
    data = bytearray(packed(files(slices)))
    for magic, size_at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.find(magic)
        data[at + size_at : at + size_at + 4] = (1500).to_bytes(4, "little")
    (tmp_path / "ct.zip").write_bytes(data)
    (source,) = discover(tmp_path, Bounds()).sources
    case = read_case(source, Bounds())
    assert "FILE_UNREADABLE" in {reason.code for reason in case.reasons}


def test_a_deflated_file_does_not_expand_beyond_its_bound(slices: Slices, tmp_path: Path) -> None:
    faults.deflated_bomb(copy.deepcopy(slices), tmp_path / "input")
    (source,) = discover(tmp_path / "input", Bounds(file_bytes=2**20)).sources
    assert source.reasons[0].code == "FILE_TOO_LARGE"


def test_nothing_of_the_patient_is_logged(
    mixed: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = mixed / "b" / "series" / "000.dcm"
    broken.write_bytes(broken.read_bytes().replace(b"2.5\\2.5 ", b"Nobody! "))
    for source in discover(mixed, Bounds()).sources:
        read_case(source, Bounds())
    out, err = capfd.readouterr()
    assert "Nobody" not in caplog.text + out + err
    assert caplog.text == ""
