"""A benchmark gives every arm the same work, tells removing from masking, and takes its own hooks away."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn

import vlattn
from vlattn.errors import InputError
from vlattn.eval.answer import environment
from vlattn.eval.bench import bench, bench_steps, check_neutral
from vlattn.eval.bench_arms import Arm, BenchArms, FirstToken, twin
from vlattn.eval.bench_inputs import find_images, make_inputs
from vlattn.eval.bench_memory import peak_memory, process_peak
from vlattn.eval.bench_saving import Saving, cache_lengths, gives_up, judge_saving
from vlattn.eval.bench_shapes import SHAPES, random_inputs, random_model
from vlattn.eval.bench_stages import STAGES, StageClock
from vlattn.eval.bench_tables import bench_tables
from vlattn.eval.cost import decode_macs, decoder_macs, kv_bytes_formula
from vlattn.eval.roofline import Roofline
from vlattn.interventions.base import Intervention
from vlattn.models.registry import adapter_for
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet, as_keywords, cached_length
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.machine import describe_machine
from vlattn.runtime.session import Session
from vlattn.runtime.timing import Timing, interleave
from vlattn.runtime.trace import Trace

Prompts = Callable[..., dict[str, Any]]

STATUS = Path("/proc/self/status")
LAYERS, TEXT, PATCHES = 3, 6, 36
MACHINE = Roofline("cpu", "float32", 1, {64: 1e11}, {"read": 1e10})
FEW: dict[str, Any] = {"new_tokens": 3, "repeats": 2, "warmup": 0, "stage_repeats": 1, "roofline": MACHINE}


@pytest.fixture
def model(llava: Callable[..., Any]) -> Any:
    return llava(decoder_layers=LAYERS, dtype=torch.float32)


@dataclass(frozen=True)
class FirstVisual(Intervention):
    """After decoder layer `layer`, go on with the first `keep` visual tokens; hide the others or remove them."""

    layer: int
    keep: int
    hide: bool
    place = "decoder"

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        def select(state: LayerState) -> Cut:
            return Cut(~state.visual | (state.visual.cumsum(1) <= self.keep))

        session.cuts.after(Request(self.layer, select, hide=self.hide), hooks)


@dataclass(frozen=True)
class MaskedFeatures(Intervention):
    """Says that it keeps 4 patches, and only closes the decoder's eyes to the other positions."""

    place = "encoder"

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        def mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
            call = as_keywords(module, args, kwargs)
            if session.visual is None or cached_length(call):
                return None
            trace.kept = torch.arange(4)[None]
            seen = ~session.visual.mask | (session.visual.slot < 4)
            return (), {**call, "attention_mask": seen.long()}

        hooks.before(session.adapter.language_model, mask)


@dataclass(frozen=True)
class Eager(Intervention):
    """Forces the decoder onto eager attention, as methods do that want its weights."""

    place = "decoder"

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        config = session.adapter.language_model.config
        before = config._attn_implementation
        config._attn_implementation = "eager"
        hooks.also(lambda: setattr(config, "_attn_implementation", before))


# Work -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(model: Any, prompts: Prompts) -> dict[str, Any]:
    inputs = [prompts(model, seed=seed) for seed in range(2)]
    return bench(model, inputs, ["flowcut:keep=9", FirstVisual(0, 9, hide=False)], **FEW, real_length=True)


def test_vanilla_comes_first_and_every_arm_has_a_ratio_to_it_by_round(results: dict[str, Any]) -> None:
    vanilla, flowcut, inside = results["arms"]
    assert [vanilla["name"], flowcut["name"]] == ["vanilla", "flowcut:keep=9"]
    assert inside["name"] == "FirstVisual(layer=0, keep=9, hide=False)"
    for row in results["arms"]:
        for stage in ("prefill", "total"):
            ratios = [a / b for a, b in zip(row["nanoseconds"][stage], vanilla["nanoseconds"][stage], strict=True)]
            assert row["ratio"][stage]["median"] == pytest.approx(sum(ratios) / 2)
            assert row["ratio"][stage]["n"] == 2
        assert row["real_length"]["new_tokens"] == 3
    assert vanilla["ratio"]["prefill"]["median"] == 1
    assert vanilla["same_ids_as_vanilla"]


def test_the_work_of_an_arm_is_what_a_count_by_hand_gives(results: dict[str, Any]) -> None:
    vanilla, flowcut, inside = results["arms"]
    widths = {"hidden": 32, "ffn": 48, "kv_width": 16}
    schedules = {
        "vanilla": [PATCHES + TEXT] * LAYERS,
        "flowcut": [9 + TEXT] * LAYERS,
        "inside": [PATCHES + TEXT] + [9 + TEXT] * (LAYERS - 1),
    }
    for row, lengths in zip((vanilla, flowcut, inside), schedules.values(), strict=True):
        assert row["decoder_lengths"] == row["cache_lengths"] == lengths
        assert row["macs"]["decoder"] == decoder_macs(lengths, **widths)
        assert row["macs"]["decode"] == decode_macs(lengths, 2, **widths)  # the first of 3 comes with the prefill
        cached = kv_bytes_formula(1, lengths, 2, 8, 4)
        assert row["kv_bytes"] == {"used": cached, "allocated": cached, "formula": cached}
    assert inside["ratios"]["tower"] == 1
    assert flowcut["ratios"]["tower"] < 1
    assert inside["ratios"]["kv_bytes"] == inside["kv_bytes"]["used"] / vanilla["kv_bytes"]["used"]
    assert [row["visual_tokens"]["final"] for row in results["arms"]] == [PATCHES, 9, 9]
    assert inside["visual_tokens"]["average"] == (PATCHES + 9 + 9) / 3


def test_pytorch_counts_what_the_formula_says_but_for_patch_embedding_and_head(results: dict[str, Any]) -> None:
    vanilla = results["arms"][0]
    counted = vanilla["prefill_flops_counted"]
    ignored = counted["by_op"]["aten.convolution"] + 2 * 32 * 64 + counted["by_op"].get("aten.bmm", 0)
    assert counted["total"] == vanilla["prefill_flops"] + ignored


def test_results_are_plain_json_and_name_the_setting(results: dict[str, Any]) -> None:
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["settings"]["prompt_lengths"] == [PATCHES + TEXT]
    assert results["settings"]["dtype"] == "float32"
    assert results["arms"][1]["attention"] == {"decoder": "sdpa", "tower": "sdpa"}
    assert results["machine"]["device"] == "cpu"
    assert results["roofline"]["flops_per_second"] == 1e11


@pytest.mark.parametrize("width", [100, 120])
def test_the_tables_fit_the_terminal_and_show_every_arm(results: dict[str, Any], width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    results["warnings"].append("mind this")
    for table in bench_tables(results):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in ("flowcut:keep=9", "removed before", "removed from layer 1", "mind this", "compute", "memory"):
        assert word in " ".join(text.split())


def test_a_bench_leaves_the_model_as_it_was(model: Any, prompts: Prompts, tiny: ModuleType) -> None:
    inputs = prompts(model)
    model(**inputs)
    before = tiny.hooks_of(model), tiny.settings_of(model)
    bench(model, [inputs], ["flowcut:keep=9", Eager()], **FEW)
    assert (tiny.hooks_of(model), tiny.settings_of(model)) == before


def test_twins_share_every_weight_and_no_hook(model: Any) -> None:
    other = twin(model)
    ours, theirs = ({n: p.data_ptr() for n, p in m.named_parameters()} for m in (model, other))
    assert ours == theirs
    other.model.register_forward_hook(lambda *_: None)
    assert len(other.model._forward_hooks) == len(model.model._forward_hooks) + 1


def test_reported_steps_add_up_to_the_announced_ones(model: Any, prompts: Prompts) -> None:
    done: list[int] = []
    inputs = [prompts(model, seed=seed) for seed in range(2)]
    options = {**FEW, "warmup": 3}
    bench(model, inputs, ["random:keep=9"], **options, step=lambda what, n: done.append(n))
    assert sum(done) == bench_steps(1, 2, repeats=2, warmup=3, stage_repeats=1)


def test_every_shape_is_warmed_up(model: Any, prompts: Prompts) -> None:
    inputs = [prompts(model, text=text) for text in (2, 3, 4)]
    assert bench(model, inputs, [], **FEW)["settings"]["warmup"] == 3
    assert bench(model, inputs[:1] * 3, [], **FEW)["settings"]["warmup"] == 0


def test_arms_of_a_round_get_the_same_inputs(model: Any, prompts: Prompts) -> None:
    inputs, seen = [prompts(model, seed=seed) for seed in range(3)], []

    @dataclass(frozen=True)
    class Watch(Intervention):
        place = "encoder"

        def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if kwargs["pixel_values"] is not None:
                    seen.append(next(i for i, x in enumerate(inputs) if torch.equal(x["pixel_values"], args[0])))

            hooks.before(
                session.adapter.tower,
                lambda m, a, k: look(m, (a[0] if a else k["pixel_values"],), {**k, "pixel_values": 1}),
            )

    bench(model, inputs, [Watch()], **{**FEW, "repeats": 3, "stage_repeats": 3})
    # One look at each, three rounds, a warm-up and three rounds by stage, memory and FLOPs on the first.
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0]


# Fixed work -----------------------------------------------------------------------------------------------------------


def test_all_arms_generate_the_same_number_of_tokens_even_where_the_model_would_stop(
    model: Any, prompts: Prompts
) -> None:
    inputs = prompts(model)
    ids = Arm("vanilla", model).generate(inputs, 6)
    model.generation_config.eos_token_id = int(ids[0, 1])  # what it says second
    with BenchArms(model, ["random:keep=9"]) as arms:
        assert [arm.generate(inputs, 6).shape[1] for arm in arms] == [6, 6]
        assert arms[0].generate(inputs, 6, fixed=False).shape[1] == 2
    found = bench(model, [inputs], [], **{**FEW, "new_tokens": 6}, real_length=True)
    assert found["arms"][0]["real_length"]["new_tokens"] == 2


def test_one_new_token_is_a_prefill_without_decoding(model: Any, prompts: Prompts) -> None:
    row = bench(model, [prompts(model)], ["flowcut:keep=9"], **{**FEW, "new_tokens": 1})["arms"][1]
    assert set(row["seconds"]) == {"prefill", "total"}
    assert row["tokens_per_second"] is None
    assert row["macs"]["decode"] == 0


def test_batches_with_padding_are_measured_as_they_run(model: Any, prompts: Prompts) -> None:
    inputs = prompts(model, images=(1, 2))
    vanilla, row = bench(model, [inputs], ["random:keep=9"], **FEW)["arms"]
    longest = inputs["input_ids"].shape[1]
    assert vanilla["kv_bytes"]["used"] == kv_bytes_formula(2, [longest] * LAYERS, 2, 8, 4)
    assert row["kv_bytes"]["used"] == kv_bytes_formula(2, [longest - 2 * (PATCHES - 9)] * LAYERS, 2, 8, 4)
    assert vanilla["visual_tokens"]["final"] == 1.5 * PATCHES


# Removed, or only masked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FirstVisual(0, 4, hide=True), MaskedFeatures()])
def test_a_method_that_only_masks_is_found_out(model: Any, prompts: Prompts, method: Intervention) -> None:
    found = bench(model, [prompts(model)], [method], **FEW)
    vanilla, row = found["arms"]
    assert row["saving"] == {"kind": "masked", "text": "masked, no real saving"}
    assert row["cache_lengths"] == vanilla["cache_lengths"]
    assert row["ratios"]["decoder"] == row["ratios"]["kv_bytes"] == 1
    assert any("masked, no real saving" in warning for warning in found["warnings"])
    assert not row["same_ids_as_vanilla"]  # it did do something


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (FirstVisual(0, 4, hide=False), "removed from layer 1"),
        (FirstVisual(1, 4, hide=False), "removed from layer 2"),
        ("flowcut:keep=4", "removed before the decoder"),
        ("flowcut:keep=36", "nothing removed"),
        (FirstVisual(0, PATCHES, hide=False), "nothing removed"),
        (FirstVisual(LAYERS - 1, 4, hide=False), "nothing removed"),  # behind the last layer nothing is saved, or said
    ],
)
def test_a_method_that_removes_is_told_where(model: Any, prompts: Prompts, method: Any, text: str) -> None:
    found = bench(model, [prompts(model)], [method], **FEW)
    assert found["arms"][1]["saving"]["text"] == text
    assert found["warnings"] == []


def test_removing_some_and_masking_others_is_said_to_be_both() -> None:
    trace = Trace(masked=True)
    assert judge_saving(trace, [36], [15, 15], [42, 42]) == Saving("removed", 0, also_masked=True)
    assert judge_saving(trace, [36], [15, 15], [42, 42]).text == "removed before the decoder, others only masked"
    assert judge_saving(trace, [36], [42, 42], [42, 42]).kind == "masked"


def test_a_batch_gives_tokens_up_only_where_every_prompt_does() -> None:
    """The cache is as long as the longest row, so one untouched prompt explains it."""
    every = Trace(visual_by_layer=[[36, 36], [9, 9], [9, 9]])
    one = Trace(visual_by_layer=[[36, 36], [9, 36], [9, 36]])
    assert gives_up(every, [36, 36], 2)
    assert not gives_up(one, [36, 36], 2)
    assert gives_up(Trace(kept_in_decoder={0: torch.tensor([[3, 5, -1]])}), [36], 2)
    assert not gives_up(Trace(kept_in_decoder={1: torch.tensor([[3, 5, -1]])}), [36], 2)  # behind the last layer
    assert gives_up(Trace(kept=torch.tensor([[0, 1, -1]])), [36], 2, patches=3)
    assert not gives_up(Trace(kept=torch.tensor([[0, 1, 2]])), [36], 2, patches=3)


def test_things_without_layers_are_no_cache() -> None:
    with pytest.raises(InputError, match="no layers"):
        cache_lengths(object())


def test_another_attention_implementation_is_reported(model: Any, prompts: Prompts) -> None:
    found = bench(model, [prompts(model)], [Eager()], **FEW)
    assert found["arms"][1]["attention"] == {"decoder": "eager", "tower": "sdpa"}
    assert found["warnings"] == [
        "Eager(): its decoder runs eager attention, vanilla sdpa; part of the ratio is the difference between the two"
    ]


def test_prefill_and_decoding_are_the_whole_time(results: dict[str, Any]) -> None:
    for row in results["arms"]:
        prefill, decode, total = (row["nanoseconds"][stage] for stage in ("prefill", "decode", "total"))
        assert [a + b for a, b in zip(prefill, decode, strict=True)] == total
        assert min(prefill) > 0
        assert min(decode) > 0


def test_the_first_token_is_noted_once_and_stops_nothing(model: Any, prompts: Prompts) -> None:
    now, inputs = [0], prompts(model)
    for layer in adapter_for(model).decoder_layers:
        layer.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    watch = FirstToken(clock=lambda: now[0], wait=lambda: None)
    assert Arm("vanilla", model).generate(inputs, 4, watch=watch).shape[1] == 4
    assert watch.nanoseconds == LAYERS
    assert now[0] == 4 * LAYERS


# Neutral settings -----------------------------------------------------------------------------------------------------


def test_a_setting_that_keeps_everything_gives_the_same_tokens(model: Any, prompts: Prompts) -> None:
    inputs = [prompts(model, seed=seed) for seed in range(2)]
    found = check_neutral(model, inputs, ["flowcut:keep=36", FirstVisual(0, PATCHES, hide=False)], 4)
    assert [check["same_ids"] for check in found] == [True, True]
    assert [check["max_logit_difference"] for check in found] == [0, 0]


def test_a_setting_that_is_not_neutral_is_caught(model: Any, prompts: Prompts) -> None:
    found = bench(model, [prompts(model)], [], **FEW, neutral=["flowcut:keep=4"])
    assert found["neutral"][0]["same_ids"] is False
    assert found["neutral"][0]["max_logit_difference"] > 1e-4
    assert found["warnings"] == ["flowcut:keep=4 should change nothing, but its tokens differ"]


# Stages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, vlattn.FlowCut(keep=9)])
def test_the_time_of_each_part_goes_to_its_stage(model: Any, prompts: Prompts, method: Intervention | None) -> None:
    """A clock that only modules move: 100 a vision layer, 10 the projector, 1 a decoder layer."""
    now = [0]

    def takes(module: nn.Module, time: int) -> None:
        module.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + time))

    adapter = adapter_for(model)
    for layer in adapter.vision_layers:
        takes(layer, 100)
    for layer in adapter.decoder_layers:
        takes(layer, 1)
    takes(adapter.projector.linear_2, 10)
    handle = method(model).attach() if method is not None else None
    with StageClock(model, clock=lambda: now[0], wait=lambda: None) as clock:
        Arm("x", model, handle).generate(prompts(model), 4)
    assert clock.nanoseconds == {
        "setup": 0,
        "vision": 600,
        "projector": 10,
        "prefill": LAYERS,
        "decode": 3 * LAYERS,
    }


def test_stages_share_the_whole_time_out(model: Any, prompts: Prompts) -> None:
    ticks = iter(range(10_000))
    start = next(ticks)
    with StageClock(model, clock=lambda: next(ticks), wait=lambda: None) as clock:
        Arm("x", model).generate(prompts(model), 3)
    assert list(clock.nanoseconds) == list(STAGES)
    assert sum(clock.nanoseconds.values()) == next(ticks) - start - 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llava", "gemma3"])
def test_a_bench_runs_on_families_with_other_towers(families: ModuleType, family: str) -> None:
    """A merger inside the tower, two towers, and pooled features."""
    model = families.model(family, dtype=torch.float32)
    inputs = families.inputs(family, model)
    found = bench(model, [inputs], ["random:keep=2"], **FEW)
    vanilla, row = found["arms"]
    assert row["saving"]["kind"] == "removed"
    assert row["ratios"]["tower"] == 1 > row["ratios"]["decoder"]
    for stage in ("vision", "projector", "prefill", "decode"):
        assert vanilla["stages"][stage]["median"] > 0


# Clock and machine ----------------------------------------------------------------------------------------------------


def test_progress_is_shown_between_rounds_and_costs_them_nothing() -> None:
    now, log = [0], []

    def arm(name: str, time: int) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            now[0] += time

        return run

    def show() -> None:
        log.append("|")
        now[0] += 1000

    arms = {"a": arm("a", 3), "b": arm("b", 5)}
    found = interleave(arms, 2, 1, clock=lambda: now[0], wait=lambda: None, after_round=show)
    assert "".join(log) == "ab|" * 3
    assert found == {"a": Timing((3, 3)), "b": Timing((5, 5))}
    assert found["b"].minus(found["a"]) == Timing((2, 2))
    with pytest.raises(InputError, match="give arms of one interleave"):
        found["b"].minus(Timing((1,)))


def test_records_and_reports_describe_the_machine_alike(model: Any) -> None:
    """The keys that records have had from the start stay, with the values they had."""
    found, machine = environment(model), describe_machine("cpu")
    assert found["machine"] == machine["cpu"]
    assert (found["threads"], found["cores"]) == (machine["threads"], machine["cores"])
    assert found["torch"] == torch.__version__ == machine["versions"]["torch"]  # type: ignore[index]
    assert found["transformers"] == transformers.__version__
    assert (found["dtype"], found["attn_implementation"]) == ("float32", "sdpa")
    assert {"vlattn", "python", "numpy", "pycocotools", "device", "system"} < set(found)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_peak_is_what_lives_at_one_time_in_one_run() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        for _ in range(3):
            torch.empty(2_000_000)  # 8 MB each, one after the other
        both = torch.empty(1_000_000), torch.empty(3_000_000)
        del both

    found = peak_memory(call, torch.device("cpu"))
    assert found["measured"]
    assert 16_000_000 <= found["above"] < 16_100_000
    assert calls == [1]


@pytest.mark.skipif(not STATUS.is_file(), reason="compares with what Linux tells")
def test_the_peak_of_the_process_is_in_bytes() -> None:
    told = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    assert process_peak() == pytest.approx(1024 * int(told.split()[1]), rel=0.05)


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_take_images_in_turn(tmp_path: Any) -> None:
    from PIL import Image

    for name, grey in (("b.png", 200), ("a.jpg", 0), ("c.txt", 0)):
        Image.new("L", (8, 8), grey).save(tmp_path / name, format="PNG")
    files = find_images([tmp_path, tmp_path / "b.png"])
    assert [f.name for f in files] == ["a.jpg", "b.png", "b.png"]
    _, processor = vlattn.load("tiny")
    made, seconds = make_inputs(processor, files[:2], "What is this?", batch=2, count=3, dtype=torch.bfloat16)
    assert len(made) == len(seconds) == 3
    pixels = [m["pixel_values"] for m in made]
    assert pixels[0].dtype == torch.bfloat16
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0][0], pixels[0][1])
    assert made[0]["input_ids"].shape[0] == 2


def test_wrong_inputs_are_refused_by_name(tmp_path: Any, model: Any, prompts: Prompts) -> None:
    one, two = prompts(model), prompts(model, images=(1, 1))
    wrong: Sequence[tuple[str, Callable[[], Any]]] = (
        ("inputs_list: got none", lambda: bench(model, [], [])),
        ("one batch size", lambda: bench(model, [one, two], [])),
        ("new_tokens", lambda: bench(model, [one], [], new_tokens=0)),
        ("repeats", lambda: bench(model, [one], [], repeats=0)),
        ("given twice", lambda: bench(model, [one], ["random:keep=9", "random:keep=9 "], **FEW)),
        ("is unknown", lambda: bench(model, [one], ["nothing:keep=9"], **FEW)),
        ("keep: got 99", lambda: bench(model, [one], ["random:keep=99"], **FEW)),
        ("holds none of", lambda: find_images([tmp_path])),
        ("images: got none", lambda: make_inputs(None, [], "x")),  # type: ignore[arg-type]
        ("batch, count", lambda: make_inputs(None, [tmp_path / "a.png"], "x", batch=0)),  # type: ignore[arg-type]
        ("shape: 'x' is unknown", lambda: random_model("x")),
        ("layers: got 0", lambda: random_model("llava-1.5-7b", layers=0)),
    )
    for message, call in wrong:
        with pytest.raises(InputError, match=message):
            call()


def test_a_model_that_something_is_attached_to_is_refused(model: Any, prompts: Prompts) -> None:
    with vlattn.FlowCut(keep=9)(model), pytest.raises(InputError, match="is attached to it"):
        bench(model, [prompts(model)], [], **FEW)


# Published sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "parameters"), [("llava-1.5-7b", 7_063_427_072), ("llava-next-7b", 7_063_431_168)])
def test_random_models_have_the_parameters_of_the_published_ones(shape: str, parameters: int) -> None:
    assert sum(p.numel() for p in random_model(shape, device="meta").parameters()) == parameters


@pytest.mark.parametrize(("shape", "visual", "tiles"), [("llava-1.5-7b", 576, 1), ("llava-next-7b", 2928, 5)])
def test_random_inputs_have_as_many_placeholders_as_the_model_makes_features(
    shape: str, visual: int, tiles: int
) -> None:
    model = random_model(shape, layers=1, device="meta")
    model_like = type("Cpu", (), {"device": torch.device("cpu"), "dtype": torch.float32, "config": model.config})()
    (inputs,) = random_inputs(model_like, batch=2, count=1, text=10)
    found = adapter_for(model).visual_tokens(inputs)
    assert found.mask.sum(1).tolist() == [visual, visual]
    assert int(found.tile.max()) + 1 == 2 * tiles
    assert inputs["input_ids"].shape == (2, visual + 10)
    assert set(SHAPES) == {"llava-1.5-7b", "llava-next-7b"}
