"""Zip archives, read in bounded memory; nothing is ever unpacked to disk.

Rules, all checked against the directory before a byte is expanded:
    1. An archive with all archives inside it has a bounded number of members, of expanded
       bytes and of levels; it may not expand to many times its own size.
    2. A member that is encrypted, too large or named outside its archive is not read.
    3. A member never gives more bytes than its directory entry says (``zipfile`` sees to it,
       and checks the sum); so a directory that lies yields an unreadable file.
"""

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.source import Member, RejectedError
from apps.imaging.reasons import Reason

ENCRYPTED_FLAG = 0x1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ENTRY_BYTES = 512  # of the directory, for a member; 46 and its name, comment and extra fields

END_RECORD = struct.Struct("<4s4H2LH")  # APPNOTE.TXT 4.3.16
END_MAGIC = b"PK\x05\x06"
END64_LOCATOR_MAGIC = b"PK\x06\x07"
END64_LOCATOR_BYTES = 20
END64_RECORD = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
COMMENT_BYTES = 2**16 - 1

READ_ERRORS = (
    OSError, EOFError, KeyError, ValueError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip


@dataclass(slots=True)
class Allowance:
    """What an outermost archive, with all inside it, may still use.

    Args:
        members: Number of members.
        num_bytes: Expanded.
    """

    members: int
    num_bytes: int

    @classmethod
    def full(cls, bounds: Bounds) -> Self:
        """Return what an archive starts with."""
        return cls(bounds.archive_members, bounds.archive_bytes)


@dataclass(frozen=True, slots=True)
class _Level:
    key: Path | str
    archive: zipfile.ZipFile
    stream: IO[bytes]
    num_bytes: int


class MemberReader:
    """Opens members; the archives on the way to the last one stay open. Not for threads."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._levels: list[_Level] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close_beyond(0)

    def read(self, member: Member) -> bytes:
        """Return the bytes of a file.

        Raises:
            RejectedError: It cannot be read, or is too large.
        """
        with self.open(member) as stream:
            return read_from(stream)

    @contextmanager
    def open(self, member: Member) -> Iterator[IO[bytes]]:
        """Give the file as a stream that can seek.

        Raises:
            RejectedError: It cannot be opened, or is too large.
        """
        try:
            stream = self._stream(member)
        except READ_ERRORS:  # their messages name files
            detail = "expected a readable file, it cannot be opened"
            raise RejectedError("FILE_UNREADABLE", detail) from None
        with stream:
            yield stream

    def list_archive(
        self, path: Path, inside: tuple[str, ...], allowance: Allowance
    ) -> tuple[list[zipfile.ZipInfo], list[tuple[zipfile.ZipInfo, Reason]]]:
        """Return the members of an archive, folders included, and those that are not read.

        Args:
            path: Of the outermost archive.
            inside: Names on the way to this one.
            allowance: Of the outermost archive; lowered by this one.

        Raises:
            RejectedError: The archive is not read, as it is broken or goes beyond a bound.
        """
        level = self._level(path, inside)
        infos = level.archive.infolist()
        self._charge(infos, level.num_bytes, allowance)
        faults = [(info, _fault(info, self._bounds)) for info in infos]
        usable = [info for info, fault in faults if fault is None]
        return usable, [(info, fault) for info, fault in faults if fault is not None]

    def _stream(self, member: Member) -> IO[bytes]:
        if not member.inside:
            _check_size(member.path.stat().st_size, self._bounds)
            return member.path.open("rb")
        archive = self._level(member.path, member.inside[:-1]).archive
        info = archive.getinfo(member.inside[-1])
        _check_size(info.file_size, self._bounds)
        return archive.open(info)

    def _level(self, path: Path, inside: tuple[str, ...]) -> _Level:
        """Return an open archive; those it is not inside of are closed."""
        keys: tuple[Path | str, ...] = (path, *inside)
        common = 0
        for key, level in zip(keys, self._levels, strict=False):
            if key != level.key:
                break
            common += 1
        self._close_beyond(common)
        for key in keys[common:]:
            self._levels.append(self._opened(key))
        return self._levels[-1]

    def _opened(self, key: Path | str) -> _Level:
        stream: IO[bytes]
        if isinstance(key, Path):
            stream = key.open("rb")
        else:
            outer = self._levels[-1].archive
            _check_size(outer.getinfo(key).file_size, self._bounds)
            stream = io.BytesIO(outer.read(key))
        num_bytes = stream.seek(0, io.SEEK_END)
        try:
            _check_directory(stream, num_bytes, self._bounds)
            return _Level(key, zipfile.ZipFile(stream), stream, num_bytes)
        except READ_ERRORS:
            stream.close()
            detail = "expected a zip archive, its directory cannot be read"
            raise RejectedError("ARCHIVE_UNREADABLE", detail) from None
        except RejectedError:
            stream.close()
            raise

    def _close_beyond(self, num: int) -> None:
        while len(self._levels) > num:
            level = self._levels.pop()
            level.archive.close()
            level.stream.close()

    def _charge(self, infos: list[zipfile.ZipInfo], packed: int, allowance: Allowance) -> None:
        expanded = sum(info.file_size for info in infos)
        bounds = self._bounds
        if len(infos) > allowance.members:
            detail = f"expected at most {bounds.archive_members} members, got {len(infos)} here"
            raise RejectedError("ARCHIVE_TOO_MANY_MEMBERS", detail)
        if expanded > allowance.num_bytes:
            detail = f"expected at most {bounds.archive_bytes} bytes expanded, got {expanded} here"
            raise RejectedError("ARCHIVE_TOO_LARGE", detail)
        if expanded > bounds.archive_free_bytes and expanded > bounds.archive_ratio * packed:
            detail = (
                f"expected at most {bounds.archive_ratio:g} times {packed} bytes, got {expanded}"
            )
            raise RejectedError("ARCHIVE_RATIO", detail)
        allowance.members -= len(infos)
        allowance.num_bytes -= expanded


def read_from(stream: IO[bytes], num_bytes: int = -1) -> bytes:
    """Return the next bytes of a file, all if no number is given.

    Raises:
        RejectedError: They cannot be read.
    """
    try:
        return stream.read(num_bytes)
    except READ_ERRORS:  # their messages name files
        detail = "expected a readable file, its bytes cannot be had"
        raise RejectedError("FILE_UNREADABLE", detail) from None


def _check_size(num_bytes: int, bounds: Bounds) -> None:
    if num_bytes > bounds.file_bytes:
        detail = f"expected at most {bounds.file_bytes} bytes, got {num_bytes}"
        raise RejectedError("FILE_TOO_LARGE", detail)


def _fault(info: zipfile.ZipInfo, bounds: Bounds) -> Reason | None:
    """Return why a member is not read."""
    parts = info.filename.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        return Reason("MEMBER_OUTSIDE", "expected a name inside the archive, it leads outside")
    if info.flag_bits & ENCRYPTED_FLAG:
        return Reason("MEMBER_ENCRYPTED", "expected an open member, it needs a password")
    if info.compress_type not in METHODS:
        return Reason("FILE_UNREADABLE", f"unknown compression method {info.compress_type}")
    if info.file_size > bounds.file_bytes:
        detail = f"expected at most {bounds.file_bytes} bytes, got {info.file_size}"
        return Reason("FILE_TOO_LARGE", detail)
    return None


def _check_directory(stream: IO[bytes], num_bytes: int, bounds: Bounds) -> None:
    """Refuse a directory that would take much memory before ``zipfile`` loads it.

    Raises:
        RejectedError: It is longer than the allowed members could make it.
        ValueError: There is none.
    """
    tail_bytes = min(num_bytes, END_RECORD.size + COMMENT_BYTES + END64_LOCATOR_BYTES)
    stream.seek(num_bytes - tail_bytes)
    tail = stream.read(tail_bytes)
    at = tail.rfind(END_MAGIC)
    if at < 0:
        message = "no end record"
        raise ValueError(message)
    directory_bytes = END_RECORD.unpack_from(tail, at)[5]
    locator = tail[at - END64_LOCATOR_BYTES : at] if at >= END64_LOCATOR_BYTES else b""
    if locator.startswith(END64_LOCATOR_MAGIC):
        (offset,) = struct.unpack_from("<Q", locator, 8)
        stream.seek(offset)
        directory_bytes = END64_RECORD.unpack(stream.read(END64_RECORD.size))[8]
    if directory_bytes > ENTRY_BYTES * bounds.archive_members:
        detail = f"expected at most {bounds.archive_members} members, the directory is longer"
        raise RejectedError("ARCHIVE_TOO_MANY_MEMBERS", detail)
