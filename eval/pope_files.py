"""POPE files: ours to write, the released ones to read.

A file `pope_random.json` holds JSON Lines, despite its name, as the released ones do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.eval.pope_build import SPLITS, PopeQuestion
from vlattn.eval.records import Record

SIDECAR = "pope_build.json"
RELEASED_LINES = 3000  # questions per released split; an early release of the random split has 2910


@dataclass(frozen=True)
class PopeFile:
    """The questions of one file, and what identifies the file."""

    path: str
    split: str
    sha256: str
    questions: tuple[PopeQuestion, ...]

    @property
    def warnings(self) -> list[str]:
        n = len(self.questions)
        released = re.search(r"coco_pope_", Path(self.path).name) is not None
        if released and n != RELEASED_LINES:
            return [
                f"{Path(self.path).name} has {n} questions and not {RELEASED_LINES}: compare with the same release only"
            ]
        return []


def write_pope(
    questions: Mapping[str, Sequence[PopeQuestion]], out: str | Path, settings: Mapping[str, Any]
) -> dict[str, Path]:
    """Write `pope_<split>.json` per split and the sidecar `pope_build.json` with settings, image ids and digests.

    The same questions and settings give the same bytes. Returns split -> path.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths, files = {}, {}
    for split, asked in questions.items():
        paths[split] = folder / f"pope_{split}.json"
        content = "".join(json.dumps(q.to_json()) + "\n" for q in asked).encode()
        paths[split].write_bytes(content)
        files[paths[split].name] = {"questions": len(asked), "sha256": hashlib.sha256(content).hexdigest()}
    image_ids = sorted({q.image_id for asked in questions.values() for q in asked})
    digest = hashlib.sha256("\n".join(map(str, image_ids)).encode()).hexdigest()
    sidecar = {"settings": dict(settings), "files": files, "image_ids_sha256": digest, "image_ids": image_ids}
    (folder / SIDECAR).write_bytes((json.dumps(sidecar, indent=1, sort_keys=True) + "\n").encode())
    return paths


def read_pope(path: str | Path, split: str | None = None) -> list[PopeFile]:
    """The questions of a POPE file, or of the three in a folder.

    The split comes from the argument, else from the file's name. Entries without `image_id` take it from the trailing
    digits of the image's file name, as COCO names its images.
    """
    place = Path(path)
    if not place.is_dir():
        return [_read_file(place, split)]
    found = sorted(
        (f for f in place.glob("*.json") if _split_of(f.name)), key=lambda f: SPLITS.index(_split_of(f.name))
    )
    if not found:
        raise InputError(f"path={str(path)!r} has no POPE files; give a folder with pope_random.json and its siblings")
    files = [_read_file(f, None) for f in found]
    if len({f.split for f in files}) < len(files):
        raise InputError(f"path={str(path)!r} has several files of one split; give a folder with one file per split")
    return files


def _split_of(name: str) -> str:
    return next((split for split in SPLITS if split in name.lower()), "")


def _read_file(path: Path, split: str | None) -> PopeFile:
    shown = f"path={str(path)!r}"
    try:
        content = path.read_bytes()
        entries = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}); give a POPE file or folder") from None
    except ValueError:
        raise InputError(f"{shown} is not JSON Lines; give a POPE file") from None
    split = split or _split_of(path.name)
    if not split:
        raise InputError(f"{shown} does not say its split; name it one of {', '.join(SPLITS)}")
    questions = tuple(_question(entry, split, shown) for entry in entries)
    if len({q.question_id for q in questions}) < len(questions):
        raise InputError(f"{shown} repeats a question_id; give each question its own")
    return PopeFile(str(path), split, hashlib.sha256(content).hexdigest(), questions)


def _question(entry: Any, split: str, shown: str) -> PopeQuestion:
    if not isinstance(entry, dict) or not {"question_id", "image", "text", "label"} <= entry.keys():
        raise InputError(f"{shown} has an entry without question_id, image, text or label; give a POPE file")
    label = str(entry["label"]).strip().lower()
    if label not in ("yes", "no"):
        raise InputError(f"{shown} has the label {entry['label']!r}; labels are yes or no")
    image_id = entry.get("image_id")
    if image_id is None:
        digits = re.search(r"(\d+)$", Path(entry["image"]).stem)
        if digits is None:
            raise InputError(
                f"{shown}: image {entry['image']!r} does not end in its COCO id; add `image_id` to the entries"
            )
        image_id = int(digits.group(1))
    if type(image_id) is not int or type(entry["question_id"]) is not int:
        raise InputError(f"{shown} has a question_id or image_id that is not an integer; write ids as integers")
    return PopeQuestion(entry["question_id"], str(entry["image"]), image_id, str(entry["text"]), label, split)


def read_official_answers(path: str | Path, questions: Sequence[PopeQuestion]) -> list[Record]:
    """Records from an answer file of the released script: lines of {"question", "answer"} in the questions' order."""
    shown = f"answers={str(path)!r}"
    try:
        entries = [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line.strip()]
        pairs = [(str(entry["question"]), str(entry["answer"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{shown} is not JSON Lines of question and answer; give an official answer file") from None
    if [text for text, _ in pairs] != [q.text for q in questions]:
        raise InputError(
            f"{shown} does not follow the {len(questions)} questions one by one; give the answers to this file"
        )
    return [
        Record(q.item_id, q.image_id, q.image, q.text, answer, label=q.label)
        for q, (_, answer) in zip(questions, pairs, strict=True)
    ]


def write_official_answers(records: Iterable[Record], questions: Sequence[PopeQuestion], path: str | Path) -> None:
    """The answers in the released script's form, in the questions' order."""
    answers = {record.id: record.raw for record in records if record.error is None}
    lost = [q.item_id for q in questions if q.item_id not in answers]
    if lost:
        raise InputError(
            f"records lack answers to {len(lost)} questions (first {lost[0]!r}); answer every question first"
        )
    lines = [json.dumps({"question": q.text, "answer": answers[q.item_id]}) + "\n" for q in questions]
    Path(path).write_text("".join(lines), encoding="utf-8")
