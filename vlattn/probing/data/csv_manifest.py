"""Images listed in a CSV file: path, label or labels, and a split where there is one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlattn.errors import InputError
from vlattn.image_file import read_rgb
from vlattn.probing.data.base import LabeledImages, Transform, choose_classes, presence


@dataclass(frozen=True)
class Row:
    """One image of a manifest. line: counted from 1, the header included."""

    line: int
    path: str
    label: str
    split: str | None


def csv_manifest(
    path: str | Path,
    transform: Transform | None = None,
    *,
    root: str | Path | None = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    multi_label: bool | None = None,
) -> LabeledImages:
    """The images that a CSV file lists.

    The first line names the columns: `path`, `label` and, optionally, `split`; others are ignored. Several labels are
    written `cat|dog`. Classes are those of the whole file, so that its splits agree on them, sorted by name, or by
    value where all are integers. Every image is listed once.

    Args:
        path: the CSV file, UTF-8.
        transform: from a PIL image to what the model takes.
        root: what image paths are relative to; default the file's folder.
        split: take the rows of this split alone.
        classes: class names in label order; a class given here may lack images.
        multi_label: whether labels are split at `|`; default whether any label has one. An empty label is then an image
            with no class.

    Returns:
        Items in file order; labels int64, or float32 [n, K] of presence.

    Raises:
        InputError: names the file and the line.
    """
    file = Path(path)
    rows = _read(file)
    if multi_label is None:
        multi_label = any("|" in row.label for row in rows)
    labels = {row.line: _labels(file, row, multi_label) for row in rows}
    known = choose_classes((name for found in labels.values() for name in found), classes, repr(str(path)))
    index = {name: label for label, name in enumerate(known)}
    chosen = _of_split(file, rows, split)
    folder = file.parent if root is None else Path(root)
    for row in chosen:
        if not (folder / row.path).is_file():
            raise InputError(f"path: {file}, line {row.line}: there is no image {str(folder / row.path)!r}; correct it")
    indices = [[index[name] for name in labels[row.line]] for row in chosen]
    return LabeledImages(
        [str(folder / row.path) for row in chosen],
        read_rgb,
        names=[row.path for row in chosen],
        labels=presence(indices, len(known)) if multi_label else torch.tensor([one for (one,) in indices]),
        classes=known,
        transform=transform,
    )


def _read(file: Path) -> list[Row]:
    rows: list[Row] = []
    first: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for name in ("path", "label"):
                if header.count(name) != 1:
                    raise InputError(
                        f"path: {file}, line 1: the columns are {', '.join(header) or 'missing'}; "
                        "name them path,label or path,label,split"
                    )
            for fields in reader:
                if not fields:
                    continue
                row = _row(file, reader.line_num, header, fields)
                if row.path in first:
                    raise InputError(
                        f"path: {file}, line {row.line}: {row.path!r} is in line {first[row.path]} already; list every "
                        "image once, several labels as cat|dog"
                    )
                first[row.path] = row.line
                rows.append(row)
    except OSError as error:
        raise InputError(f"path: {file} cannot be read ({error.strerror}); give a CSV file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"path: {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise InputError(f"path: {file}, line {reader.line_num}: {error}; write commas between fields") from None
    if not rows:
        raise InputError(f"path: {file} lists no image; write one line per image under the header")
    return rows


def _row(file: Path, line: int, header: list[str], fields: list[str]) -> Row:
    where = f"path: {file}, line {line}"
    if len(fields) != len(header):
        raise InputError(f"{where}: {len(fields)} fields under {len(header)} columns; write one field per column")
    values = dict(zip(header, (field.strip() for field in fields), strict=True))
    if not values["path"]:
        raise InputError(f"{where}: the path is empty; name an image")
    return Row(line, values["path"], values["label"], values.get("split"))


def _labels(file: Path, row: Row, multi_label: bool) -> tuple[str, ...]:
    """Names of classes, each once, in the order written."""
    where = f"path: {file}, line {row.line}"
    if not multi_label:
        if not row.label:
            raise InputError(f"{where}: the label is empty; name a class, or give multi_label=True")
        return (row.label,)
    found = [name.strip() for name in row.label.split("|")] if row.label else []
    if not all(found):
        raise InputError(f"{where}: the label {row.label!r} has an empty part; write labels as cat|dog")
    return tuple(dict.fromkeys(found))


def _of_split(file: Path, rows: list[Row], split: str | None) -> list[Row]:
    if split is None:
        return rows
    there = sorted({row.split for row in rows if row.split is not None})
    if not there:
        raise InputError(
            f"split: got {split!r}, but {file}, line 1 names no column `split`; add it, or leave split out"
        )
    if split not in there:
        raise InputError(f"split: {file} has no rows of {split!r}; choose one of {', '.join(map(repr, there))}")
    return [row for row in rows if row.split == split]
