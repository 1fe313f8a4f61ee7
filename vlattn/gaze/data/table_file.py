"""Tables with a row of names, from CSV files and from spreadsheets."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from vlattn.errors import InputError


def read_table(path: str | Path, sheet: str | None = None) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns, and the rows by those names; rows without any value are left out.

    Args:
        path: .csv (UTF-8, all values are text), or a spreadsheet (.xlsx, .xls, .xlsb, .ods), read by python-calamine.
        sheet: the sheet's name; None takes the first.

    Raises:
        InputError: the file or sheet cannot be read, has no row of names, or python-calamine is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: does not exist; give a CSV file or a spreadsheet")
    if file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as text:
            lines: list[list[Any]] = list(csv.reader(text))
    else:
        lines = _spreadsheet(file, sheet)
    if not lines:
        raise InputError(f"{path}: is empty; give a table whose first row names the columns")
    names = [str(name).strip() for name in lines[0]]
    rows = [dict(zip(names, line, strict=False)) for line in lines[1:] if any(value != "" for value in line)]
    return names, rows


def _spreadsheet(file: Path, sheet: str | None) -> list[list[Any]]:
    try:
        import python_calamine
    except ModuleNotFoundError:
        raise InputError(
            f"{file}: reading spreadsheets needs python-calamine, which is not installed; run "
            "pip install 'vlattn[scanpath]', or save the sheet as CSV"
        ) from None
    try:
        book = python_calamine.CalamineWorkbook.from_path(str(file))
    except python_calamine.CalamineError as error:
        raise InputError(
            f"{file}: is no readable spreadsheet ({error}); give .xlsx, .xls, .xlsb, .ods or .csv"
        ) from None
    if sheet is not None and sheet not in book.sheet_names:
        raise InputError(f"sheet: {file} has no sheet {sheet!r}; it has {', '.join(book.sheet_names)}")
    found = book.get_sheet_by_index(0) if sheet is None else book.get_sheet_by_name(sheet)
    return found.to_python()
