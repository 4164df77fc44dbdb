"""The smallest .xlsx that spreadsheet programs and pandas read: one sheet of texts and whole numbers.

Evaluation servers take this format; a zip of five XML files needs no further dependency.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from ...errors import InputError, RunError

CELL_LIMIT = 32_767  # characters; Excel refuses a file with more
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # by XML
_TIME = (1980, 1, 1, 0, 0, 0)  # the same answers give the same bytes
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_OFFICE = "http://schemas.openxmlformats.org"
_PARTS = {
    "[Content_Types].xml": (
        f'<Types xmlns="{_OFFICE}/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/xl/workbook.xml"'
        ' ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
        '<Override PartName="/xl/worksheets/sheet1.xml"'
        ' ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>'
    ),
    "_rels/.rels": (
        f'<Relationships xmlns="{_OFFICE}/package/2006/relationships"><Relationship Id="rId1"'
        f' Type="{_OFFICE}/officeDocument/2006/relationships/officeDocument" Target="xl/workbook.xml"/></Relationships>'
    ),
    "xl/workbook.xml": (
        f'<workbook xmlns="{_OFFICE}/spreadsheetml/2006/main"'
        f' xmlns:r="{_OFFICE}/officeDocument/2006/relationships">'
        '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
    ),
    "xl/_rels/workbook.xml.rels": (
        f'<Relationships xmlns="{_OFFICE}/package/2006/relationships"><Relationship Id="rId1"'
        f' Type="{_OFFICE}/officeDocument/2006/relationships/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'
    ),
}


def write_xlsx(path: Path, rows: Sequence[Sequence[str | int | None]]) -> None:
    """Write `rows` to the first sheet, whole or not at all. Characters that XML cannot hold are left out.

    Raises InputError for a text that is too long for a cell, RunError when the disk refuses.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as book:
            for name, text in {**_PARTS, "xl/worksheets/sheet1.xml": "".join(_sheet(rows))}.items():
                book.writestr(zipfile.ZipInfo(name, _TIME), _HEAD + text, zipfile.ZIP_DEFLATED)
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _sheet(rows: Sequence[Sequence[str | int | None]]) -> Iterator[str]:
    yield f'<worksheet xmlns="{_OFFICE}/spreadsheetml/2006/main"><sheetData>'
    for number, row in enumerate(rows, 1):
        yield f'<row r="{number}">'
        for column, value in enumerate(row):
            yield _cell(f"{chr(ord('A') + column)}{number}", value)
        yield "</row>"
    yield "</sheetData></worksheet>"


def _cell(place: str, value: str | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f'<c r="{place}"><v>{value}</v></c>'
    if len(value) > CELL_LIMIT:
        raise InputError(f"cell {place} would hold {len(value)} characters; {CELL_LIMIT} is the limit of .xlsx")
    text = escape(_FORBIDDEN.sub("", value))
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
