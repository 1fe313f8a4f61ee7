"""Attention over keys in groups: the reference against plain loops and against the methods, Triton against it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.modulate import modulate
from vlattn.interventions.var_redistribute import KeySets, Masses, Parts, image_centric, merge, redistribute
from vlattn.interventions.vhd_knockout import knockout_outputs
from vlattn.kernels import reference_grouped_attention
from vlattn.ops import GroupedAttention, Redistribution

triton_installed = pytest.importorskip("triton")
from vlattn.kernels import grouped_attention as kernel  # noqa: E402  (needs triton)

RULES = [
    Redistribution(),
    Redistribution(rho_nonsink=0.7, min_visual_mass=0.4, move=1.0),
    Redistribution(rho_nonsink=0.6, min_visual_mass=0.1, move=0.3, require_visual_sink=False, eps=1e-2),
]
ASKED: dict[str, dict[str, Any]] = {
    "output": {},
    "masses": {"lse": True, "mass": True},
    "knockout": {"knockout": True, "mass": True},
    "redistribution": {"redistribution": RULES[1], "lse": True},
    "everything": {"redistribution": RULES[2], "lse": True, "mass": True, "partial": True, "knockout": True},
}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Random arguments. Every option is on unless `plain`; the last prompt's first keys are padding."""

    def __init__(
        self,
        size: tuple[int, int, int, int, int, int],
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        causal: bool = True,
        mask: str = "keys",
        plain: bool = False,
        sharpness: float = 1.0,
    ) -> None:
        b, h, hkv, r, n, d = size
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.q, self.k, self.v = sharpness * noise(b, h, r, d), noise(b, hkv, n, d), noise(b, hkv, n, d)
        self.groups = torch.randint(0, 4, (b, n), generator=generator, dtype=torch.uint8)
        self.options: dict[str, Any] = {"scale": 1.5 * d**-0.5, "causal": causal}
        if mask == "keys":
            self.options["key_mask"] = uniform(seed + 1, b, n) < 0.8
        if mask == "rows":
            self.options["key_mask"] = uniform(seed + 1, b, r, n) < 0.8
        if not plain:
            self.options |= {
                "edited_rows": uniform(seed + 2, b, r) < 0.7,
                "gamma": (uniform(seed + 3, b, n) - 0.3).clamp(min=0),
                "head_weights": 0.3 + uniform(seed + 4, b, h),
                "head_scale": 2 * uniform(seed + 5, b, h),
            }

    def run(self, backend: Any = "reference", **more: Any) -> GroupedAttention:
        return ops.grouped_attention(self.q, self.k, self.v, self.groups, **self.options, backend=backend, **more)


def naive(case: Case, rule: Redistribution | None) -> dict[str, torch.Tensor]:
    """Everything the op gives, row by row in fp64."""
    q, k, v = case.q.double(), case.k.double(), case.v.double()
    (batch, heads, rows, width), keys = q.shape, k.shape[2]
    share, options = heads // k.shape[1], case.options
    found = {
        "output": q.new_zeros(batch, heads, rows, width),
        "lse": q.new_full((batch, heads, rows), -torch.inf),
        "mass": q.new_zeros(batch, heads, rows, 4),
        "partial": q.new_zeros(batch, heads, rows, 4, width),
        "without": q.new_zeros(batch, heads, rows, width),
        "shift": q.new_zeros(batch, heads, rows),
        "chosen": torch.zeros(batch, heads, rows, dtype=torch.bool),
    }
    for b in range(batch):
        group = case.groups[b].tolist()
        for h in range(heads):
            for r in range(rows):
                at = (b, h, r)
                edited = "edited_rows" not in options or bool(options["edited_rows"][b, r])
                logits: dict[int, float] = {}
                for j in range(keys):
                    mask = options.get("key_mask")
                    if options["causal"] and j > r + keys - rows:
                        continue
                    if mask is not None and not bool(mask[b, j] if mask.ndim == 2 else mask[b, r, j]):
                        continue
                    s = options["scale"] * float(q[b, h, r] @ k[b, h // share, j])
                    if "gamma" in options and edited:
                        s += float(options["gamma"][b, j]) * float(options["head_weights"][b, h]) * abs(s)
                    logits[j] = s
                if not logits:
                    continue
                top = max(logits.values())
                z = sum(math.exp(s - top) for s in logits.values())
                p = {j: math.exp(s - top) / z for j, s in logits.items()}
                found["lse"][at] = top + math.log(z)
                for j in p:
                    found["mass"][at][group[j]] += p[j]
                    found["partial"][at][group[j]] += p[j] * v[b, h // share, j]
                others = {j: s for j, s in logits.items() if group[j] in (0, 3)}
                top = max(others.values(), default=0)
                others = {j: math.exp(s - top) for j, s in others.items()}
                for j, e in others.items():
                    found["without"][at] += e / sum(others.values()) * v[b, h // share, j]
                found["shift"][at] = (found["partial"][at].sum(0) - found["without"][at]).norm()
                factor = [1.0] * 4
                if rule is not None and edited:
                    _, free, visual_sink, text_sink = found["mass"][at].tolist()
                    image = free + visual_sink
                    counted = image + rule.eps * sum(g in (1, 2) for g in group)
                    fits = visual_sink <= (1 - rule.rho_nonsink) * counted and image >= rule.min_visual_mass
                    if fits and free > 0 and (2 in group or not rule.require_visual_sink):
                        found["chosen"][at] = True
                        gain = 1 + rule.move * (visual_sink + text_sink) / free
                        factor = [1.0, gain, 1 - rule.move, 1 - rule.move]
                for g in range(4):
                    found["output"][at] += factor[g] * found["partial"][at][g]
                if "head_scale" in options:
                    found["output"][at] *= float(options["head_scale"][b, h])
    return found


def assert_same(found: GroupedAttention, expected: Any, tolerance: float, skip: tuple[str, ...] = ()) -> None:
    expected = expected if isinstance(expected, dict) else expected._asdict()
    for name, value in found._asdict().items():
        if value is None or name in skip:
            continue
        if value.dtype == torch.bool:
            assert torch.equal(value, expected[name]), name
            continue
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(value.double(), expected[name].double(), msg=lambda m, n=name: f"{n}: {m}", **close)


# The reference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [None, *RULES], ids=["none", "default", "all", "eps"])
@pytest.mark.parametrize("mask", ["none", "keys", "rows"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_what_plain_loops_give(
    causal: bool, mask: str, rule: Redistribution | None, dtype: torch.dtype
) -> None:
    case = Case((2, 4, 2, 3, 9, 4), dtype=dtype, causal=causal, mask=mask)
    found = case.run(redistribution=rule, lse=True, mass=True, partial=True, knockout=True)
    expected = naive(case, rule)
    assert_same(found, expected, 1e-12 if dtype == torch.float64 else 1e-5, skip=("output",))
    low = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.output.double(), expected["output"], rtol=low, atol=low)
    assert found.output.dtype == dtype
    assert found.mass is not None
    assert found.mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=["default", "all", "eps"])
def test_redistribution_is_what_var_does_to_dense_weights_and_to_merged_softmaxes(rule: Redistribution) -> None:
    chosen_rows = 0
    for seed in range(3):
        case = Case((2, 4, 2, 5, 40, 8), seed, plain=True, sharpness=2)
        sets = KeySets(sink=case.groups >= 2, image=(case.groups == 1) | (case.groups == 2))
        assert torch.equal(sets.groups, case.groups)
        logits = case.q @ case.k.repeat_interleave(2, 1).transpose(2, 3) * case.options["scale"]
        allowed = torch.ones(5, 40, dtype=torch.bool).tril(35) & case.options["key_mask"][:, None, None]
        logits = logits.masked_fill(~allowed, -torch.inf)
        weights = logits.softmax(-1)
        masses = Masses.of(weights, sets)
        chosen = image_centric(masses, sets, rule)
        dense = redistribute(weights, sets, masses, chosen, rule.move) @ case.v.repeat_interleave(2, 1)
        merged, chosen_too = merge(Parts.of(logits, case.v, sets), sets, rule, torch.ones(1, 1, 1, dtype=torch.bool))
        for backend in ("reference", "triton"):
            if backend == "triton":
                case.q, case.k, case.v = case.q.float(), case.k.float(), case.v.float()
            found = case.run(backend, redistribution=rule)
            close = 1e-12 if backend == "reference" else 3e-6
            torch.testing.assert_close(found.output.double(), dense, rtol=close, atol=close)
            torch.testing.assert_close(found.output.double(), merged, rtol=close, atol=close)
            assert found.chosen is not None
            assert torch.equal(found.chosen, chosen)
            assert torch.equal(found.chosen, chosen_too)
        chosen_rows += int(chosen.sum())
    assert 0 < chosen_rows < 3 * chosen.numel()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_knock_out_is_that_of_vhd_knockout_and_raised_logits_are_those_of_pai_and_paint(backend: str) -> None:
    case = Case((2, 4, 2, 5, 40, 8), dtype=torch.float32, mask="rows")
    case.options.pop("edited_rows")
    logits = case.q @ case.k.repeat_interleave(2, 1).transpose(2, 3) * case.options["scale"]
    allowed = torch.ones(5, 40, dtype=torch.bool).tril(35) & case.options["key_mask"][:, None]
    strength = case.options["gamma"][:, None, None] * case.options["head_weights"][..., None, None]
    logits = modulate(logits, strength, allowed).float()
    visual = (case.groups == 1) | (case.groups == 2)
    shift, without = knockout_outputs(logits, allowed, visual, case.v)
    found = case.run(backend, knockout=True)
    torch.testing.assert_close(found.shift, shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.without, without, rtol=1e-5, atol=1e-5)


def test_masses_sum_to_one_and_partial_outputs_to_the_output() -> None:
    case = Case((2, 4, 2, 5, 33, 8), plain=True)
    found = case.run(mass=True, partial=True)
    assert found.mass is not None
    assert found.partial is not None
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(found.partial.sum(3), found.output)
    assert [found.lse, found.without, found.shift, found.chosen] == [None] * 4


def test_blocks_of_rows_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((2, 4, 2, 13, 20, 8), mask="rows")
    whole = case.run(**ASKED["everything"])
    monkeypatch.setattr(reference_grouped_attention, "CPU_BLOCK", 2 * 4 * 20 * 3)
    assert_same(case.run(**ASKED["everything"]), whole, 1e-13)


def test_gradients_of_the_reference_are_those_of_finite_differences() -> None:
    case = Case((1, 2, 1, 3, 6, 3), seed=1)
    for name in ("edited_rows", "key_mask"):
        case.options.pop(name)
    given = [case.q, case.k, case.v, case.options["gamma"], case.options["head_scale"]]
    rule = Redistribution(rho_nonsink=0, min_visual_mass=0)

    def run(q: Any, k: Any, v: Any, gamma: Any, head_scale: Any) -> Any:
        options = {**case.options, "gamma": gamma, "head_scale": head_scale}
        made = ops.grouped_attention(q, k, v, case.groups, **options, redistribution=rule, mass=True, knockout=True)
        return made.output, made.mass, made.without, made.shift

    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in given])


# Triton ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize(
    ("size", "mask", "causal"),
    [
        ((1, 1, 1, 1, 1, 1), "none", True),
        ((2, 4, 2, 1, 65, 20), "keys", False),
        ((1, 3, 1, 17, 63, 16), "none", True),
        ((1, 2, 2, 64, 65, 8), "rows", True),
        ((1, 7, 1, 5, 17, 33), "keys", False),
    ],
    ids=str,
)
def test_triton_is_the_reference(size: Any, mask: str, causal: bool, asked: str) -> None:
    case = Case(size, dtype=torch.float32, causal=causal, mask=mask)
    assert_same(case.run("triton", **ASKED[asked]), case.run(**ASKED[asked]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("rows", [1, 65])
def test_triton_is_the_reference_over_577_keys(rows: int) -> None:
    case = Case((1, 1, 1, rows, 577, 64), dtype=torch.float32, plain=rows > 1)
    case.groups[:, 128:512] = 1  # tiles of one group, as an image is
    asked = {"redistribution": RULES[0], "mass": True}
    assert_same(case.run("triton", **asked), case.run(**asked), TOLERANCE[torch.float32])


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(0, 50),
                   st.integers(1, 20)),
    dtype=st.sampled_from(list(TOLERANCE)),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "keys", "rows"]),
    plain=st.booleans(),
    asked=st.sampled_from(list(ASKED)),
    one_group=st.none() | st.integers(0, 3),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_triton_is_the_reference_whatever_is_asked(
    size: tuple[int, ...], dtype: torch.dtype, causal: bool, mask: str, plain: bool, asked: str, one_group: int | None,
    seed: int,
) -> None:  # fmt: skip
    b, hkv, share, r, more, d = size
    case = Case((b, hkv * share, hkv, r, r + more, d), seed, dtype, causal, mask, plain)
    if one_group is not None:
        case.groups.fill_(one_group)
    options = dict(ASKED[asked])
    if "redistribution" in options:  # no threshold that rounding could put a row on either side of
        options["redistribution"] = Redistribution(rho_nonsink=0, min_visual_mass=0, require_visual_sink=False)
    assert_same(case.run("triton", **options), case.run(**options), TOLERANCE[dtype])


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_keys_split_over_programs_give_what_one_program_gives(asked: str) -> None:
    case = Case((2, 4, 2, 3, 300, 8), dtype=torch.float32)
    case.options["key_mask"][:, 128:256] = False  # a split in which nothing is seen
    options = {**case.options, **ASKED[asked]}
    split = kernel.grouped_attention(case.q, case.k, case.v, case.groups, **options, chunk=128)
    assert_same(split, case.run("triton", **ASKED[asked]), TOLERANCE[torch.float32])
    assert_same(split, case.run(**ASKED[asked]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_views_with_any_strides_give_what_their_copies_give(backend: str) -> None:
    case = Case((2, 4, 2, 9, 30, 8), dtype=torch.float32, mask="rows")
    whole = case.run(backend, **ASKED["everything"])
    case.q = case.q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    case.k, case.v = (x.transpose(1, 2).repeat_interleave(2, -1).transpose(1, 2)[..., ::2] for x in (case.k, case.v))
    case.groups = case.groups.t().contiguous().t()
    for name in ("edited_rows", "gamma", "head_weights", "head_scale"):
        case.options[name] = case.options[name].t().contiguous().t()
    case.options["key_mask"] = case.options["key_mask"].transpose(1, 2).contiguous().transpose(1, 2)
    assert case.k.stride(-1) == 2
    assert_same(case.run(backend, **ASKED["everything"]), whole, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_see_nothing_give_zeros_and_leave_the_others_alone(backend: str) -> None:
    case = Case((2, 4, 2, 3, 20, 8), dtype=torch.float32, causal=False, mask="rows")
    before = case.run(backend, **ASKED["everything"])
    case.options["key_mask"][0, 1] = False
    found = case.run(backend, **ASKED["everything"])
    for name, value in found._asdict().items():
        row = value[0, :, 1]
        assert bool(row.isneginf().all() if name == "lse" else (row == 0).all()), name
        assert torch.equal(value[1], getattr(before, name)[1]), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sharpness", [1e4, -1e4])
def test_huge_logits_do_not_overflow(backend: str, sharpness: float) -> None:
    case = Case((1, 2, 1, 5, 33, 8), dtype=torch.float32, plain=True)
    case.q = case.q * sharpness
    # fp32 carries logits of 1e4 to about 1e-3, and so their softmax.
    found = case.run(backend, **ASKED["masses"], partial=True, knockout=True)
    assert_same(found, naive(case, None), 2e-2)
    assert bool(found.output.isfinite().all())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_image_that_takes_all_the_attention_leaves_an_output_without_it(backend: str) -> None:
    case = Case((1, 2, 1, 3, 33, 8), dtype=torch.float32, plain=True, causal=False, mask="none")
    image = (case.groups == 1) | (case.groups == 2)
    case.q, case.k[..., 0] = torch.zeros_like(case.q), 0
    case.q[..., 0], case.k[:, 0, image[0], 0] = 1, 1e4  # the text's share is no longer a number of fp32
    found = case.run(backend, knockout=True)
    text = case.v[:, :, ~image[0]].mean(2)  # all their logits are 0
    torch.testing.assert_close(found.without, text[:, :, None].expand(1, 2, 3, 8).contiguous(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_are_not_edited_are_those_of_plain_attention(backend: str) -> None:
    case = Case((2, 4, 2, 6, 33, 8), dtype=torch.float32)
    case.options.pop("head_scale")
    found = case.run(backend, redistribution=RULES[1])
    plain = torch.nn.functional.scaled_dot_product_attention(
        case.q, case.k, case.v, scale=case.options["scale"], enable_gqa=True,
        attn_mask=torch.ones(6, 33, dtype=torch.bool).tril(27) & case.options["key_mask"][:, None, None],
    )  # fmt: skip
    rows = case.options["edited_rows"][:, None].expand(2, 4, 6)
    torch.testing.assert_close(found.output[~rows], plain[~rows], rtol=1e-5, atol=1e-6)
    assert float((found.output - plain)[rows].abs().max()) > 1e-2
    assert found.chosen is not None
    assert not bool(found.chosen[~rows].any())


def test_two_runs_give_the_same_bits() -> None:
    case = Case((2, 4, 2, 3, 300, 8), dtype=torch.float32)
    options = {**case.options, **ASKED["everything"], "chunk": 128}
    once, again = (kernel.grouped_attention(case.q, case.k, case.v, case.groups, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# As an operator -------------------------------------------------------------------------------------------------------
def _operands(rows: int = 3) -> tuple[Any, ...]:
    case = Case((1, 2, 1, rows, 9, 4), dtype=torch.float32)
    o, slack = case.options, torch.zeros(1)
    return (
        case.q, case.k, case.v, case.groups, 0.5, True, o["key_mask"], o["edited_rows"], o["gamma"].float(),
        o["head_weights"].float(), slack, 0.5, 0.2, 0.4, o["head_scale"].float(), True, True, True, True, 0,
    )  # fmt: skip


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    torch.library.opcheck(torch.ops.vlattn.grouped_attention, _operands())
    bare = list(_operands())
    bare[6:11] = [None] * 5
    bare[14:19] = [None, False, False, False, False]
    torch.library.opcheck(torch.ops.vlattn.grouped_attention, tuple(bare))


def test_a_compiled_function_gives_what_it_gives_without_compilation() -> None:
    case = Case((1, 2, 1, 3, 9, 4), dtype=torch.float32)

    def function(q: torch.Tensor) -> Any:
        made = ops.grouped_attention(
            2 * q, case.k, case.v, case.groups, **case.options, backend="triton", **ASKED["everything"]
        )
        return made.output + 1, made.mass, made.chosen

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(function(case.q), compiled(case.q), strict=True):
        assert torch.equal(a, b)


def test_the_flop_counter_counts_two_products() -> None:
    case = Case((2, 4, 2, 3, 9, 8), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        case.run("triton", redistribution=RULES[0])
    assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 3 * 9 * 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 1, 9, 5)}, r"v: got torch.float32 \(1, 1, 9, 5\); give one value for each key"),
        ({"k": torch.zeros(1, 1, 9, 5)}, "q and k: expected"),
        ({"groups": torch.zeros(1, 9, dtype=torch.int64)}, r"groups: got torch.int64 \(1, 9\); give int8 or uint8"),
        ({"groups": torch.full((1, 9), 4, dtype=torch.int8)}, "groups: some are not in 0 to 3"),
        ({"groups": torch.full((1, 9), -1, dtype=torch.int8)}, "groups: some are not in 0 to 3"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_mask: got torch.bool"),
        ({"edited_rows": torch.ones(1, 4, dtype=torch.bool)}, r"edited_rows: got torch.bool \(1, 4\)"),
        ({"gamma": torch.ones(9)}, r"gamma: got torch.float32 \(9,\); give floating-point numbers \(1, 9\)"),
        ({"head_weights": torch.ones(1, 2, dtype=torch.int64)}, "head_weights: got torch.int64"),
        ({"head_scale": torch.ones(1, 3)}, r"head_scale: got torch.float32 \(1, 3\)"),
        ({"q": torch.zeros(1, 2, 10, 4)}, "causal: 10 queries but only 9 keys"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    given = {
        "q": torch.zeros(1, 2, 3, 4), "k": torch.zeros(1, 1, 9, 4), "v": torch.zeros(1, 1, 9, 4),
        "groups": torch.zeros(1, 9, dtype=torch.int8), "scale": 1.0, "causal": True,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        ops.grouped_attention(**{**given, **change})  # type: ignore[arg-type]


def test_what_the_kernel_does_not_cover_is_refused_by_name() -> None:
    case = Case((1, 2, 1, 3, 9, 4), dtype=torch.float32)
    case.q.requires_grad_()
    with pytest.raises(InputError, match="has no gradients; give backend='reference'"):
        case.run("triton")
    with torch.no_grad():
        assert case.run("triton").output.shape == (1, 2, 3, 4)
    with pytest.raises(InputError, match=r"has no torch.float64"):
        Case((1, 2, 1, 3, 9, 4)).run("triton")
    with pytest.raises(InputError, match="at most 256 channels, not 257"):
        Case((1, 2, 1, 3, 9, 257), dtype=torch.float32).run("triton")
