"""Studies from an archive, and outputs to it, over DICOMweb (DICOM PS3.18).

A study is pulled into a folder, which is then an input like any other; outputs are pushed as
they were written.  Addresses hold study UIDs: no error of the transport is passed on as it is.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests
from dicomweb_client import DICOMwebClient
from pydicom import dcmread

from apps.imaging.reading.bounds import Bounds

AS_STORED = (("application/dicom", "*"),)  # the archive is not asked to convert

logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL)  # its messages hold UIDs


class DicomWebError(RuntimeError):
    """The archive did not do what it was asked to."""


@contextmanager
def open_archive(url: str, headers: Mapping[str, str] | None = None) -> Iterator[DICOMwebClient]:
    """Give a client of an archive.

    Args:
        url: Of its DICOMweb service.
        headers: Sent with each request, such as ``Authorization``.
    """
    with requests.Session() as session:
        session.headers.update(headers or {})
        yield DICOMwebClient(url, session=session)


def pull_study(client: DICOMwebClient, study_uid: str, folder: Path, bounds: Bounds) -> int:
    """Write the instances of a study to a folder, and return their number.

    Args:
        client: Of the archive.
        study_uid: Of the study.
        folder: Where to; new.
        bounds: ``archive_members`` is how many instances there may be.

    Raises:
        DicomWebError: The archive has no such study, or sends too many instances.
        FileExistsError: The folder is there.
    """
    folder.mkdir(parents=True)
    num = 0
    with _told_plainly("send a study"):
        for instance in client.iter_study(study_uid, media_types=AS_STORED):
            num += 1
            if num > bounds.archive_members:
                message = f"expected at most {bounds.archive_members} instances, got more"
                raise DicomWebError(message)
            instance.save_as(folder / f"{num:06d}.dcm")
    return num


def push_files(client: DICOMwebClient, paths: Sequence[Path]) -> None:
    """Store DICOM files, one request each, so that none waits in memory for another.

    Args:
        client: Of the archive.
        paths: The files.

    Raises:
        DicomWebError: The archive refused one; those before it are stored.
    """
    for num_stored, path in enumerate(paths):
        with _told_plainly(f"store file {num_stored + 1} of {len(paths)}"):
            answer = client.store_instances([dcmread(path)])
        if answer.get("FailedSOPSequence"):
            message = f"expected {len(paths)} files to be stored, the archive refused number "
            raise DicomWebError(f"{message}{num_stored + 1}; those before it are stored")


@contextmanager
def _told_plainly(request: str) -> Iterator[None]:
    try:
        yield
    except requests.HTTPError as error:
        message = f"expected the archive to {request}, it refused"
        if error.response is not None:
            message = f"{message} with status {error.response.status_code}"
            error.response.close()  # it was streamed
        raise DicomWebError(f"{message}; check the address, the study and your rights") from None
    except (requests.RequestException, ValueError) as error:
        message = f"expected the archive to {request}, got {type(error).__name__}"
        raise DicomWebError(f"{message}; check the address") from None
