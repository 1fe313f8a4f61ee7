"""A sweep's configuration, budgets and differences, on values made by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from vlattn.assets.paths import tiny_coco
from vlattn.errors import InputError
from vlattn.eval.items import Item
from vlattn.eval.records import Record, RecordWriter
from vlattn.eval.sweep import method_names
from vlattn.eval.sweep_budget import one_per_image, prefill_budget, read_budgets
from vlattn.eval.sweep_compare import add_differences, reference_of
from vlattn.eval.sweep_config import SweepArm, SweepConfig
from vlattn.interventions.registry import parse_method
from vlattn.runtime.trace import Trace

GOOD = {"images": 4, "methods": {"random": ["random:keep=36"], "flow": ["flowcut:keep=36", "flowcut:keep=9"]}}


def arm(setting: str, tokens: float, chair_tokens: float | None = None) -> dict[str, Any]:
    pope, chair = ({"average": t} for t in (tokens, tokens if chair_tokens is None else chair_tokens))
    method = setting.partition(":")[0]
    return {"method": method, "setting": setting, "file": setting, "budget": {"pope": pope, "chair": chair}}


def test_the_arms_are_vanilla_and_every_setting_in_order() -> None:
    found = SweepConfig(**GOOD).arms
    assert [(a.method, a.setting) for a in found] == [
        ("vanilla", "vanilla"),
        ("random", "random:keep=36"),
        ("flow", "flowcut:keep=36"),
        ("flow", "flowcut:keep=9"),
    ]


def test_the_configuration_that_is_shipped_can_be_read_by_name_and_by_path(tmp_path: Path) -> None:
    by_name = SweepConfig.read("sweep_tiny")
    path = Path(__file__).parent.parent.parent / "configs" / "sweep_tiny.yaml"
    assert SweepConfig.read(path) == by_name
    assert by_name.files == tiny_coco("val")
    assert [parse_method(arm.setting) is None for arm in by_name.arms] == [True] + [False] * (len(by_name.arms) - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "images: got 0; give an integer from 1"),
        ({"images": True}, "images: got True"),
        ({"seed": -1}, "seed: got -1; give an integer from 0"),
        ({"bootstrap": "many"}, "bootstrap: got 'many'"),
        ({"methods": {}}, "methods: got {}"),
        ({"methods": {"flow": "flowcut:keep=3"}}, "methods: flow has 'flowcut:keep=3'; write a list"),
        ({"methods": {"flow": []}}, r"methods: flow has \[\]"),
        ({"methods": {"v": ["vanilla"]}}, "v lists vanilla, which is always run"),
        ({"methods": {"vanilla": ["random:keep=3"]}}, "vanilla is always run"),
        ({"methods": {"flow": ["flowcut:kep=3"]}}, "'kep=3' is no setting of flowcut"),
        ({"methods": {"a": ["flowcut:keep=3"], "b": ["flowcut:keep=3"]}}, "'flowcut:keep=3' is listed twice"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SweepConfig(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images: [", "is not YAML"),
        ("just words", "holds no keys"),
        ("images: 4\nmethod: {}", "unknown key 'method'; known: .*methods"),
        ("images: 4", "lacks the key 'methods'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        SweepConfig.read(tmp_path / "odd.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        SweepConfig.read(tmp_path / "absent.yaml")


def test_data_may_be_any_coco_files_and_must_be_all_of_them(tmp_path: Path) -> None:
    own = {"images": str(tmp_path), "instances": "a.json", "captions": "b.json"}
    config = SweepConfig(**GOOD, data=own)
    assert (config.files.images, config.files.instances) == (tmp_path, Path("a.json"))
    assert config.data_name == "a.json"
    with pytest.raises(InputError, match="data: got"):
        _ = SweepConfig(**GOOD, data={"images": str(tmp_path)}).files
    with pytest.raises(InputError, match="is not a folder"):
        _ = SweepConfig(**GOOD, data=own | {"images": "nowhere"}).files


def test_a_setting_has_a_file_name_of_its_own() -> None:
    assert SweepArm("f", "flowcut:keep=36,count=per_image").file == "flowcut_keep-36_count-per_image"
    assert SweepArm("f", "a:x=1.5+b/../c").file == "a_x-1.5_b_.._c"


def test_the_methods_of_a_composed_setting_are_its_parts() -> None:
    assert method_names("flowcut:keep=3,count=per_image + var") == ["flowcut", "var"]


def test_one_item_per_image_is_the_first_of_each() -> None:
    items = [Item(str(n), image, "", "") for n, image in enumerate([5, 5, 3, 5, 3, 9])]
    assert [item.id for item in one_per_image(items)] == ["0", "2", "5"]


def test_a_prompts_budget_is_what_its_trace_says_and_the_full_count_without_a_method(
    llava: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llava()
    inputs = prompts(model, images=(1,))
    full = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert prefill_budget(model, inputs, None) == {
        **dict.fromkeys(("full", "final", "average", "counted"), full),
        "masked": False,
    }

    def told(model: Any) -> contextlib.nullcontext[Trace]:
        return contextlib.nullcontext(Trace(visual_by_layer=[[10], [10], [4], [2]], masked=True))

    found: Any = told
    assert prefill_budget(model, inputs, found) == {
        **{"full": full, "final": 2, "average": 8, "counted": pytest.approx(16 / 3)},
        "masked": True,
    }


def test_the_budget_of_an_arm_is_the_mean_over_prompts(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "b.jsonl", {"task": "budget"}) as writer:
        for n, tokens in enumerate([10.0, 20.0, 60.0]):
            meta = {"full": 144.0, "final": tokens, "average": tokens + 1, "counted": tokens + 2, "masked": n == 2}
            writer.write(Record(str(n), n, meta=meta))
    means = {"full": 144, "final": 30, "average": 31, "counted": 32}
    assert read_budgets(tmp_path / "b.jsonl") == means | {"masked": True}


def test_random_of_the_same_budget_is_the_nearest_within_a_twentieth() -> None:
    arms = [arm("vanilla", 144), arm("random:36", 36), arm("random:38", 38), arm("random:9", 9)]
    found = [
        reference_of(tested, [*arms, tested], "random", "pope", "average")
        for tested in (arm("a", 37.4), arm("a", 35), arm("a", 60), arm("random:1", 36), arms[0])
    ]
    assert [other and other["setting"] for other in found] == ["random:38", "random:36", None, None, None]


def test_each_task_is_matched_by_its_own_budget() -> None:
    arms = [arm("random:36", 36), arm("random:9", 9), arm("a", 36, chair_tokens=9)]
    found = [reference_of(arms[2], arms, "random", task, "average") for task in ("pope", "chair")]
    assert [other and other["setting"] for other in found] == ["random:36", "random:9"]


def test_differences_are_b_minus_a_with_p_values_adjusted_over_the_arms() -> None:
    arms = [arm("vanilla", 144), arm("random:36", 36), arm("a", 36), arm("b", 36)]
    p_values = {"random:36": 0.03, "a": 0.01, "b": None}
    calls = []

    def compare(task: str, a: str, b: str, metrics: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        calls.append((task, a, b))
        one = {"difference": 0.5, "low": 0.4, "high": 0.6, "p_value": p_values[b], "level": 0.95}
        return {name: dict(one) for name in metrics}

    add_differences(arms, "average", compare)
    assert {(a, b) for task, a, b in calls if task == "chair"} == {
        ("vanilla", "random:36"), ("vanilla", "a"), ("vanilla", "b"), ("random:36", "a"), ("random:36", "b"),
    }  # fmt: skip
    assert arms[0]["against"] == {"vanilla": {"pope": None, "chair": None}, "random": {"pope": None, "chair": None}}
    against = arms[2]["against"]
    assert against["random"]["pope"]["setting"] == "random:36"
    assert against["random"]["pope"]["visual_tokens"] == 36
    # Two p-values against vanilla, 0.01 and 0.03: the smaller counts twice. Against random there is but one.
    assert against["vanilla"]["chair"]["metrics"]["chair_i"]["p_holm"] == pytest.approx(0.02)
    assert arms[1]["against"]["vanilla"]["chair"]["metrics"]["chair_i"]["p_holm"] == pytest.approx(0.03)
    assert against["random"]["chair"]["metrics"]["chair_i"]["p_holm"] == pytest.approx(0.01)
    assert arms[3]["against"]["random"]["pope"]["metrics"]["f1"]["p_holm"] is None
