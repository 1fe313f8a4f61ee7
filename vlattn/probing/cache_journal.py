"""Which rows of a cache are done, with their checksums, so that a run that was cut off goes on behind the last one."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from vlattn.errors import InputError
from vlattn.probing.cache_layout import Layout, as_bytes, part_path

try:
    import fcntl
except ImportError:  # Windows has no such lock; two writers of one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

_SYNC_SECONDS = (
    1.0  # written per batch (outlives the process); forced to disk at most this often (outlives the machine)
)
_PIECE = 2**24  # bytes read at once to check them


class Entry(NamedTuple):
    """Rows start to stop, the CRC-32 of their bytes by part, and where the entry's line ends in the journal."""

    start: int
    stop: int
    crc: dict[str, int]
    end: int


def journal_path(folder: Path) -> Path:
    return folder / "journal.jsonl"


def read_journal(folder: Path) -> tuple[list[Entry], int]:
    """The entries, and how many rows a sync had certainly brought to disk. A torn last line is passed over.

    Raises:
        InputError: a line is no entry, or does not go on where the one before it ended.
    """
    path = journal_path(folder)
    content = path.read_bytes() if path.is_file() else b""
    entries: list[Entry] = []
    synced = end = 0
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True), 1):
        end += len(line)
        try:
            found: Any = json.loads(line)
            if "synced" in found:
                synced = int(found["synced"])
                continue
            entry = Entry(int(found["start"]), int(found["stop"]), dict(found["crc"]), end)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"folder: {path}, line {number} is damaged; write the cache anew") from None
        if entry.start != rows_done(entries) or entry.stop <= entry.start:
            raise InputError(f"folder: {path}, line {number} does not follow the line before; write the cache anew")
        entries.append(entry)
    return entries, synced


def rows_done(entries: list[Entry]) -> int:
    return entries[-1].stop if entries else 0


def damaged(folder: Path, layout: Layout, entry: Entry) -> str | None:
    """The first file whose rows do not have the checksum of the entry; None where all do."""
    for part in layout.parts:
        if part not in entry.crc:
            continue
        path, size = part_path(folder, part), layout.row_bytes(part)
        left, crc = (entry.stop - entry.start) * size, 0
        with path.open("rb") as file:
            file.seek(entry.start * size)
            while left and (piece := file.read(min(left, _PIECE))):
                crc, left = zlib.crc32(piece, crc), left - len(piece)
        if left or crc != entry.crc[part]:
            return path.name
    return None


class CacheWriter:
    """Appends rows to the files of a cache and to its journal; entering it finds out how many are done.

    Rows that a sync did not cover are checked first, and written again where the machine went down before they reached
    the disk.

    Raises:
        InputError: another process is writing the same cache, or a file is gone.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout, self.done = folder, layout, 0
        self._synced_at = 0.0
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> CacheWriter:
        self._journal = journal_path(self.folder).open("ab")
        try:
            self._lock()
            entries, synced = read_journal(self.folder)
            for part in self.layout.parts:
                self._files[part] = self._open(part, bool(entries))
            whole = [e.stop <= synced or not damaged(self.folder, self.layout, e) for e in entries]
            entries = entries[: [*whole, False].index(False)]
            self._journal.truncate(entries[-1].end if entries else 0)
            self.done = rows_done(entries)
            self._sync()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._sync()
        finally:
            self._close()

    def write(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Write the next rows: a contiguous CPU tensor [n, *shape] by part, labels with view 0 alone."""
        start, stop = self.done, self.done + len(next(iter(rows.values())))
        crc = {}
        for part, tensor in rows.items():
            content = as_bytes(tensor)
            file = self._files[part]
            file.seek(start * self.layout.row_bytes(part))
            file.write(content)
            file.flush()
            crc[part] = zlib.crc32(content)
        self._note({"start": start, "stop": stop, "crc": crc})
        self.done = stop
        if time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            self._sync()

    def _open(self, part: str, begun: bool) -> BinaryIO:
        path = part_path(self.folder, part)
        if not path.is_file():
            if begun:
                raise InputError(f"folder: {path} is gone, though its rows are noted as done; write the cache anew")
            path.touch()
        file = path.open("r+b")
        file.truncate(self.layout.part_bytes(part))  # holes take no room until they are written
        return file

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"folder: another process is writing {self.folder}; wait for it, or stop it") from None
        except OSError:  # some network file systems have no locks
            return

    def _note(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def _sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
        self._note({"synced": self.done})
        os.fsync(self._journal.fileno())
        self._synced_at = time.monotonic()

    def _close(self) -> None:
        for file in [*self._files.values(), self._journal]:
            file.close()
