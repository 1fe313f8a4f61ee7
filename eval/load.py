"""What `score` and `compare` have in common: from files on disk to scored items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlattn.errors import InputError
from vlattn.eval.chair import Caption, ChairResult, score_chair
from vlattn.eval.chair_io import captions_of, read_captions
from vlattn.eval.chair_words import CHAIR_PROFILES
from vlattn.eval.coco import CocoSet
from vlattn.eval.pope_files import PopeFile, read_official_answers
from vlattn.eval.pope_parse import PARSERS
from vlattn.eval.pope_score import PopeResult, score_pope
from vlattn.eval.records import Record, check_same_ids, ids_sha256, read_records, read_sidecar, usable

TASKS = {"pope": tuple(PARSERS), "chair": CHAIR_PROFILES}


@dataclass(frozen=True)
class Items:
    """The answered items of a records file, as records or as captions, by task; and the ids of those that failed."""

    path: str
    records: tuple[Record, ...] = ()
    captions: tuple[Caption, ...] = ()
    error_ids: tuple[str, ...] = ()
    sidecar: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return [item.id for item in (self.records or self.captions)]

    def to_json(self) -> dict[str, Any]:
        """What a report says about the items; the digest covers failed ones too."""
        ids = self.ids
        return {
            "file": Path(self.path).name,
            "n_items": len(ids) + len(self.error_ids),
            "n_scored": len(ids),
            "n_errors": len(self.error_ids),
            "error_ids": list(self.error_ids),
            "ids_sha256": ids_sha256([*ids, *self.error_ids]),
        }


def choose_task(path: str | Path, task: str | None) -> str:
    """The task asked for, else the one in the sidecar; they must not differ."""
    recorded = ((read_sidecar(path) or {}).get("settings") or {}).get("task")
    if task is not None and task not in TASKS:
        raise InputError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")
    if task is None and recorded not in TASKS:
        raise InputError(
            f"task is not given and {str(path)!r} has no sidecar naming it; choose one of {', '.join(TASKS)}"
        )
    if task is not None and recorded in TASKS and recorded != task:
        raise InputError(f"task={task!r} but {str(path)!r} holds answers for {recorded!r}; leave the task out")
    return task or str(recorded)


def choose_profile(task: str, profile: str | None) -> str:
    """The profile asked for, else the task's first: the one that published numbers use."""
    if profile is None:
        return TASKS[task][0]
    if profile not in TASKS[task]:
        raise InputError(f"profile={profile!r} is no {task} profile; choose one of {', '.join(TASKS[task])}")
    return profile


def load_items(path: str | Path, task: str, files: Sequence[PopeFile] = ()) -> Items:
    """Records, or what other scripts write: caption lists for chair, {"question", "answer"} lines for pope."""
    sidecar = read_sidecar(path) or {}
    first = _first_entry(path)
    if isinstance(first, dict) and "raw" in first and "id" in first:
        answered, failed = usable(read_records(path))
        if not answered:
            raise InputError(f"records={str(path)!r} holds no answered item; nothing can be scored")
        if task == "chair":
            return Items(str(path), (), tuple(captions_of(answered)), tuple(failed), sidecar)
        return Items(str(path), tuple(answered), (), tuple(failed), sidecar)
    if task == "chair":
        return Items(str(path), captions=tuple(read_captions(path)), sidecar=sidecar)
    if isinstance(first, dict) and {"question", "answer"} <= first.keys():
        if not files:
            raise InputError(f"records={str(path)!r} holds bare answers; give the POPE question file as annotations")
        questions = [question for file in files for question in file.questions]
        return Items(str(path), tuple(read_official_answers(path, questions)), sidecar=sidecar)
    raise InputError(f"records={str(path)!r} holds no records; give the .jsonl file of a run")


def _first_entry(path: str | Path) -> Any:
    try:
        with open(path, encoding="utf-8") as lines:
            return json.loads(next((line for line in lines if line.strip()), ""))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"records={str(path)!r} cannot be read ({error}); give the .jsonl file of a run") from None
    except ValueError:
        return None  # not JSON Lines: perhaps one JSON document


def score_items_pope(items: Items, profile: str, files: Sequence[PopeFile] = ()) -> PopeResult:
    """Score POPE items; given question files, the items must answer all of their questions."""
    if not files:
        return score_pope(items.records, profile)
    questions = [question for file in files for question in file.questions]
    check_same_ids([q.item_id for q in questions], [*items.ids, *items.error_ids], f"records={items.path!r}")
    failed = set(items.error_ids)
    return score_pope(items.records, profile, [q for q in questions if q.item_id not in failed])


def score_items_chair(items: Items, profile: str, coco: CocoSet | None, truncate: str) -> ChairResult:
    """Score CHAIR items against annotations."""
    if coco is None:
        raise InputError("annotations is missing; CHAIR needs the COCO instances file of the captioned images")
    return score_chair(items.captions, coco, profile, truncate)
