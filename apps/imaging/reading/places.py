"""The places of an input: its folders, its zip archives and the folders inside these.

Nothing is decoded here.  Linked folders are followed, and each folder is listed once.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apps.imaging.reading.archives import Allowance, MemberReader
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.source import Member, RejectedError, SetAside
from apps.imaging.reasons import Reason

ARCHIVE_SUFFIX = ".zip"
SYSTEM_FOLDERS = frozenset({"__MACOSX"})
SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
APPLE_DOUBLE = "._"  # a file's attributes, beside it under its own name

_LINK_REPEATED = Reason("LINK_REPEATED", "a link to a folder that is read under another name")
_FOLDER_UNREADABLE = Reason("FOLDER_UNREADABLE", "expected a readable folder, it cannot be listed")
_BROKEN_LINK = Reason("FILE_UNREADABLE", "expected a file, it is a link that leads nowhere")
_DEVICE = Reason("FOREIGN_FILE", "expected a regular file, it is a device or a pipe")
_SYSTEM_FILE = Reason("FOREIGN_FILE", "left by an operating system")


@dataclass(slots=True)
class Place:
    """A folder or an archive.

    Args:
        label: Relative to the input; ``.`` is the input itself.
        separator: Between the label and a name in the place.
        is_leaf: Whether no other place is below it.
        members: Its files.
        set_aside: What is not to be read.
    """

    label: str
    separator: str = "/"
    is_leaf: bool = True
    members: list[Member] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)

    def label_of(self, name: str) -> str:
        """Return the label of what lies in the place."""
        return name if self.label == "." else f"{self.label}{self.separator}{name}"

    def put_aside(self, name: str, reason: Reason) -> None:
        """Note that a file of the place is not to be read."""
        self.set_aside.append(SetAside(self.label_of(name), reason))


def walk(root: Path, reader: MemberReader, bounds: Bounds) -> Iterator[Place]:
    """Yield the places of an input; what cannot be entered is a place that says why.

    Args:
        root: A folder, or a single file.
        reader: Opens archives.
        bounds: Limits of archives.
    """
    if root.is_dir():
        yield from _Folders(reader, bounds).walk(root)
    elif root.name.lower().endswith(ARCHIVE_SUFFIX):
        yield from walk_archive(Member(root), root.name, reader, bounds)
    else:
        yield Place(".", members=[Member(root)])


def walk_archive(
    member: Member,
    label: str,
    reader: MemberReader,
    bounds: Bounds,
    allowance: Allowance | None = None,
) -> Iterator[Place]:
    """Yield the places of an archive and of those inside it.

    Args:
        member: The archive.
        label: Of it, relative to the input.
        reader: Opens it.
        bounds: Limits.
        allowance: What those around it have left; None if it is the outermost.
    """
    allowance = allowance or Allowance.full(bounds)
    if len(member.inside) >= bounds.archive_depth:
        detail = f"expected at most {bounds.archive_depth} archives inside each other"
        yield Place(label, set_aside=[SetAside(label, Reason("ARCHIVE_TOO_DEEP", detail))])
        return
    tree = _ArchiveTree(label)
    try:
        usable, refused = reader.list_archive(member.path, member.inside, allowance)
    except RejectedError as error:
        yield Place(label, set_aside=[SetAside(label, error.reason)])
        return
    for info in usable:
        tree.add(info.filename, Member(member.path, (*member.inside, info.filename)))
    for info, reason in refused:
        tree.root.put_aside(info.filename.rsplit("/", 1)[-1], reason)
    yield from tree.places()
    for nested_label, nested in tree.archives:
        yield from walk_archive(nested, nested_label, reader, bounds, allowance)


@dataclass(slots=True)
class _Listing:
    place: Place
    folders: list[tuple[Path, str]] = field(default_factory=list)
    links: list[tuple[Path, str]] = field(default_factory=list)
    archives: list[tuple[Path, str]] = field(default_factory=list)


class _Folders:
    def __init__(self, reader: MemberReader, bounds: Bounds) -> None:
        self._reader = reader
        self._bounds = bounds
        self._entered: set[tuple[int, int]] = set()  # device and inode

    def walk(self, root: Path) -> Iterator[Place]:
        pending = [(root, ".")]
        links: deque[tuple[Path, str]] = deque()  # come last: a folder keeps its own label
        while pending or links:
            folder, label = pending.pop() if pending else links.popleft()
            if self._was_entered(folder):
                yield Place(label, is_leaf=False, set_aside=[SetAside(label, _LINK_REPEATED)])
                continue
            listing = self._list(folder, label)
            pending += listing.folders
            links += listing.links
            yield listing.place
            for path, name in listing.archives:
                yield from walk_archive(Member(path), name, self._reader, self._bounds)

    def _list(self, folder: Path, label: str) -> _Listing:
        listing = _Listing(Place(label))
        try:
            self._entered.add(_identity(folder))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            listing.place.set_aside.append(SetAside(label, _FOLDER_UNREADABLE))
            return listing
        for entry in entries:
            self._sort_in(entry, listing)
        listing.place.is_leaf = not (listing.folders or listing.links or listing.archives)
        return listing

    def _sort_in(self, entry: os.DirEntry[str], listing: _Listing) -> None:
        place, path = listing.place, Path(entry.path)
        try:
            mode = entry.stat().st_mode
        except OSError:
            place.put_aside(entry.name, _BROKEN_LINK)
            return
        child = (path, place.label_of(entry.name))
        if is_system_name(entry.name):
            place.put_aside(entry.name, _SYSTEM_FILE)
        elif stat.S_ISDIR(mode) and not entry.is_symlink():
            listing.folders.append(child)
        elif stat.S_ISDIR(mode) and self._was_entered(path):
            place.put_aside(entry.name, _LINK_REPEATED)
        elif stat.S_ISDIR(mode):
            listing.links.append(child)
        elif not stat.S_ISREG(mode):
            place.put_aside(entry.name, _DEVICE)
        elif entry.name.lower().endswith(ARCHIVE_SUFFIX):
            listing.archives.append(child)
        else:
            place.members.append(Member(path))

    def _was_entered(self, folder: Path) -> bool:
        try:
            return _identity(folder) in self._entered
        except OSError:
            return False  # listing it will fail, and say so


class _ArchiveTree:
    """The folders of one archive."""

    def __init__(self, label: str) -> None:
        self.root = Place(label, separator="!/")
        self.archives: list[tuple[str, Member]] = []
        self._folders = {"": self.root}

    def add(self, name: str, member: Member) -> None:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        is_folder = name.endswith(("/", "\\"))
        if not parts or any(is_system_name(part) for part in parts[:-1]):
            return
        if is_folder and not is_system_name(parts[-1]):
            self._folder(parts)
            return
        place = self._folder(parts[:-1])
        if is_system_name(parts[-1]):
            place.put_aside(parts[-1], _SYSTEM_FILE)
        elif parts[-1].lower().endswith(ARCHIVE_SUFFIX):
            place.is_leaf = False
            self.archives.append((place.label_of(parts[-1]), member))
        else:
            place.members.append(member)

    def places(self) -> Iterator[Place]:
        """Yield the folders that hold files or are leaves."""
        for place in self._folders.values():
            if place.members or place.set_aside or place.is_leaf:
                yield place

    def _folder(self, parts: list[str]) -> Place:
        place = self.root
        for end in range(1, len(parts) + 1):
            key = "/".join(parts[:end])
            if key not in self._folders:
                place.is_leaf = False
                self._folders[key] = Place(place.label_of(parts[end - 1]))
            place = self._folders[key]
        return place


def is_system_name(name: str) -> bool:
    """Tell whether an operating system left the file or folder beside the user's."""
    return name in SYSTEM_FOLDERS or name.lower() in SYSTEM_FILES or name.startswith(APPLE_DOUBLE)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
