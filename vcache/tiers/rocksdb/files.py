"""Chunk records as files: where they lie, how one is written and read. Engines and the owner both come here.

    chunks/ab/ab12…   the record of the chunk key ab12…, 64 hexadecimal digits
    chunks/new/…      one that is being written; renamed when it is whole

An engine copies straight between the file and the memory of the chunk, and computes the checksum piece by
piece while the piece is in the processor's cache.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vcache.limits import KEY_BYTES, RECORD_HEADER_BYTES, RECORD_PIECE_BYTES
from vcache.tiers.record import (
    Flaw,
    Header,
    checksum_of_pieces,
    flaw_in_header,
    piece_checksum,
    read_header,
)
from vcache.tiers.rocksdb.pieces import Helper, read_chunk

FOLDER: Final = "chunks"
_NEW: Final = "new"


def path_of(directory: Path, key: bytes) -> str:
    """Where the record of a key lies."""
    name = key.hex()
    return f"{directory}/{FOLDER}/{name[:2]}/{name}"


def draft_path(directory: Path, name: str) -> str:
    """Where a record lies while it is written; no name is used twice."""
    return f"{directory}/{FOLDER}/{_NEW}/{name}"


def write(path: str, header: Header, chunk: memoryview) -> None:
    """Write a record, whose checksum is computed here. Raises OSError, as when the disk is full."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        checksums = []
        for at in range(0, len(chunk), RECORD_PIECE_BYTES):
            piece = chunk[at : at + RECORD_PIECE_BYTES]
            checksums.append(piece_checksum(piece))
            _write_all(fd, piece, RECORD_HEADER_BYTES + at)
        header = header._replace(checksum=checksum_of_pieces(checksums))
        _write_all(fd, memoryview(header.pack()), 0)
    finally:
        os.close(fd)


def _write_all(fd: int, piece: memoryview, offset: int) -> None:
    while piece:
        written = os.pwrite(fd, piece, offset)
        piece, offset = piece[written:], offset + written


def read(
    path: str, key: bytes, layout: bytes, into: memoryview, helper: Helper | None = None
) -> Header | Flaw | None:
    """Fill `into` with the chunk of `key`; its header, or what is wrong with the record; None: there is none.

    What `into` holds unless the answer is a header is undefined. helper: reads along. Raises OSError.
    """
    try:
        fd = _opened(path)
    except FileNotFoundError:
        return None
    if fd is None:
        return Flaw.NOT_OURS
    try:
        header = read_header(os.pread(fd, RECORD_HEADER_BYTES, 0))
        if isinstance(header, Flaw):
            return header
        flaw = flaw_in_header(header, key, layout, len(into))
        if flaw is not None:
            return flaw
        return header if read_chunk(fd, into, helper) == header.checksum else Flaw.CHUNK
    except OSError as error:
        if error.errno == errno.EIO:  # a bad sector: it does not get better
            return Flaw.CHUNK
        raise
    finally:
        os.close(fd)


def _opened(path: str) -> int | None:
    """A plain file, to be read; None: it is a link, a folder, a pipe … that somebody else has put there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def header_at(path: str) -> Header | Flaw:
    """The header of a record, if the file is as long as it says. Raises OSError."""
    fd = _opened(path)
    if fd is None:
        return Flaw.NOT_OURS
    try:
        header = read_header(os.pread(fd, RECORD_HEADER_BYTES, 0))
        if isinstance(header, Header) and os.fstat(fd).st_size != RECORD_HEADER_BYTES + header.length:
            return Flaw.LENGTH
        return header
    finally:
        os.close(fd)


def prepare(directory: Path) -> None:
    """Make the folders, and remove what was being written when somebody was killed."""
    for name in (_NEW, *(f"{first:02x}" for first in range(256))):
        folder = directory / FOLDER / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:  # something else lies there
            folder.unlink()
            folder.mkdir(mode=0o700)
    for path in (directory / FOLDER / _NEW).iterdir():
        remove(str(path))


def there(directory: Path) -> Iterator[tuple[bytes, str, int]]:
    """Every whole file: key, path, bytes. What is no file of a key's name is removed; folders stay."""
    for first in range(256):
        with os.scandir(directory / FOLDER / f"{first:02x}") as entries:
            for entry in entries:
                key = _key_named(entry.name)
                if key is not None and key[0] == first and entry.is_file(follow_symlinks=False):
                    yield key, entry.path, entry.stat(follow_symlinks=False).st_size
                else:
                    remove(entry.path)


def _key_named(name: str) -> bytes | None:
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES and key.hex() == name else None


def remove(path: str) -> None:
    """Remove a file; none there is fine, and one that cannot be removed is found when it is opened anew."""
    with suppress(OSError):
        os.unlink(path)


def remove_for_sure(path: str) -> None:
    """Remove a file, if it is there. Raises OSError if it stays."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync(paths: list[str]) -> None:
    """Have files on the disk, and their names; those that are gone by now do not matter. Raises OSError."""
    for path in paths:
        try:
            _sync(_opened(path))
        except FileNotFoundError:
            continue
    for folder in sorted({os.path.dirname(path) for path in paths}):
        _sync(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _sync(fd: int | None) -> None:
    if fd is not None:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def view_of(tensor: Any) -> memoryview:
    """A contiguous uint8 tensor in host memory, as bytes."""
    return memoryview(tensor.numpy()).cast("B")
