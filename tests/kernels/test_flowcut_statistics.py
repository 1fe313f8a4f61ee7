"""FlowCut's numbers of a layer: the reference against plain loops, Triton against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.flowcut_score import adaptive_count, flowcut_score, running_average
from vlattn.ops import FlowCutStatistics

triton_installed = pytest.importorskip("triton")
from vlattn.kernels import flowcut_statistics as kernel  # noqa: E402  (needs triton)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ATTENTION = ["made", "given"]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Random arguments. attention: "made" from query and keys, or "given"."""

    def __init__(
        self,
        size: tuple[int, int, int, int, int],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        attention: str = "made",
        ragged: bool = True,
        past: bool = True,
        sharpness: float = 1.0,
    ) -> None:
        b, h, hkv, n, d = size
        self.v = (0.7 * draw(seed, b, hkv, n, d)).to(dtype)
        self.q = (sharpness * draw(seed + 1, b, h, d)).to(dtype)
        self.k = draw(seed + 2, b, hkv, n, d).to(dtype)
        self.options: dict[str, Any] = {}
        chance = torch.rand(b, n - 1, generator=torch.Generator().manual_seed(seed + 3))
        if ragged:
            self.options["alive"] = chance < 0.7
        if attention == "made":
            self.options |= {"cls_query": self.q, "k": self.k, "scale": 1.5 * d**-0.5}
        else:
            row = draw(seed + 4, b, h, n).softmax(-1)
            if ragged:
                row[:, :, 1:] *= (chance < 0.7)[:, None]
            self.options["cls_attention"] = row.to(torch.float64 if dtype == torch.float64 else torch.float32)
        if past:
            self.options |= {"average": draw(seed + 5, b, n - 1).abs().to(self.v.dtype), "momentum": 0.3}

    def run(self, backend: Any = "triton", **more: Any) -> FlowCutStatistics:
        return ops.flowcut_statistics(self.v, **{**self.options, **more}, backend=backend)

    def check(self) -> None:
        assert_close(self.run(), self.run("reference"))


def assert_close(found: FlowCutStatistics, expected: FlowCutStatistics, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for name, value in found._asdict().items():
        one, other = value.double(), getattr(expected, name).double()
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


def naive(case: Case) -> FlowCutStatistics:
    """Patch by patch, in fp64."""
    options = case.options
    v = case.v.double()
    (batch, kv_heads, tokens, width), heads = v.shape, case.q.shape[1]
    made = [torch.zeros(batch, tokens - 1, dtype=torch.float64) for _ in range(3)]
    entropy = torch.zeros(batch, dtype=torch.float64)
    for b in range(batch):
        alive = [True, *options["alive"][b].tolist()] if "alive" in options else [True] * tokens

        def softmax(logits: list[float], alive: list[bool] = alive) -> list[float]:
            e = [math.exp(s) if a else 0.0 for s, a in zip(logits, alive, strict=True)]
            return [x / sum(e) for x in e]

        a, s = [0.0] * tokens, [0.0] * tokens
        for h in range(heads):
            if "cls_attention" in options:
                row = options["cls_attention"][b, h].tolist()
            else:
                keys = case.k[b, h // (heads // kv_heads)].double()
                row = softmax([options["scale"] * float(case.q[b, h].double() @ key) for key in keys])
            a = [old + x / heads for old, x in zip(a, row, strict=True)]
        for g in range(kv_heads):
            row = softmax([float(v[b, g, 0] @ v[b, g, j]) for j in range(tokens)])
            s = [old + x / kv_heads for old, x in zip(s, row, strict=True)]
        for j in range(1, tokens):
            size = sum(abs(float(v[b, :, j, i].sum()) / kv_heads) for i in range(width))
            share = a[j] / sum(a[1:]) if a[j] else 0.0
            score = (share + (s[j] / sum(s[1:]) if s[j] else 0.0)) * size
            made[0][b, j - 1], made[1][b, j - 1] = score, a[j]
            made[2][b, j - 1] = score
            if "average" in options:
                past = float(options["average"][b, j - 1])
                made[2][b, j - 1] = options["momentum"] * past + (1 - options["momentum"]) * score
            entropy[b] -= share * math.log(share) if share else 0.0
    return FlowCutStatistics(*made, entropy)


# The reference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_reference_is_what_plain_loops_give(attention: str, ragged: bool, dtype: torch.dtype) -> None:
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    for past in (False, True):
        case = Case((2, 4, 2, 9, 5), dtype=dtype, attention=attention, ragged=ragged, past=past)
        found = case.run("reference")
        assert_close(found, naive(case), **close)
        assert found.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_parts_that_flowcut_runs_on_a_cpu_give_the_same_bits(ragged: bool, dtype: torch.dtype) -> None:
    case = Case((2, 3, 3, 38, 8), dtype=dtype, ragged=ragged, past=False)
    alive = case.options.get("alive")
    keys = None if alive is None else torch.nn.functional.pad(alive, (1, 0), value=True)
    row = ops.query_row_attention(case.q[:, :, None], case.k, scale=case.options["scale"], key_mask=keys)[:, :, 0]
    score, attention = flowcut_score(row, case.v, alive)
    past = draw(8, 2, 37).to(score.dtype)
    found = ops.flowcut_statistics(case.v, **case.options, average=past)
    assert torch.equal(found.score, score)
    assert torch.equal(found.attention, attention)
    assert torch.equal(found.average, running_average(past, score))
    count = torch.full((2,), 37) if alive is None else alive.sum(-1)
    h = found.entropy / count.to(score.dtype).log()
    n = ((count - 9).to(score.dtype) / math.sqrt(4) * (1 - h * h)).round().long().clamp(min=0)
    assert torch.equal(n.minimum((count - 9).clamp(min=0)), adaptive_count(attention, count, 9, 4))


# Triton ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 2, 1), (2, 4, 2, 18, 20), (1, 3, 3, 64, 16), (1, 3, 1, 65, 8), (2, 2, 2, 66, 33)], ids=str
)
def test_triton_is_the_reference(size: Any, ragged: bool, attention: str) -> None:
    Case(size, attention=attention, ragged=ragged, past=ragged).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_is_the_reference_for_576_patches(dtype: torch.dtype) -> None:
    Case((1, 3, 3, 577, 64), dtype=dtype).check()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    attention=st.sampled_from(ATTENTION),
    ragged=st.booleans(),
    past=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_triton_is_the_reference_whatever_is_given(
    size: tuple[int, ...], dtype: torch.dtype, attention: str, ragged: bool, past: bool, seed: int
) -> None:
    b, hkv, share, n, d = size
    Case((b, hkv * share, hkv, n, d), seed, dtype, attention, ragged, past).check()


def test_many_tokens_take_heads_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((1, 5, 5, 40, 8))
    whole = case.run()
    monkeypatch.setattr(kernel, "HELD", 128)  # two heads of 64 tokens
    assert_close(case.run(), whole)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_views_with_any_strides_give_what_their_copies_give(backend: str, attention: str) -> None:
    case = Case((2, 4, 2, 19, 8), attention=attention)
    whole = case.run(backend)
    case.v = case.v.transpose(1, 2).repeat_interleave(2, -1).transpose(1, 2)[..., ::2]
    for name, value in case.options.items():
        if isinstance(value, torch.Tensor):
            case.options[name] = value.transpose(0, -1).contiguous().transpose(0, -1)
            assert not case.options[name].is_contiguous()
    assert case.v.stride(-1) == 2
    assert_close(case.run(backend), whole)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_filler_changes_nothing_and_scores_nothing(backend: str, attention: str) -> None:
    case = Case((1, 2, 2, 9, 4), attention=attention, ragged=False)
    alone = case.run(backend)
    more = {"v": case.v, **{name: x for name, x in case.options.items() if isinstance(x, torch.Tensor)}}
    for name, x in more.items():
        if name == "cls_query":
            continue
        dim = -1 if name in ("cls_attention", "average") else 2
        extra = 3 + torch.zeros_like(x.narrow(dim, 0, 1)) if name in ("v", "k") else 0 * x.narrow(dim, 0, 1)
        more[name] = torch.cat([x, extra], dim)
    case.v = more.pop("v")
    alive = torch.tensor([[True] * 8 + [False]])
    found = case.run(backend, **more, alive=alive)
    for name, value in found._asdict().items():
        if name == "entropy":
            torch.testing.assert_close(value, alone.entropy)
        else:
            torch.testing.assert_close(value[:, :-1], getattr(alone, name))
            assert float(value[0, -1]) == 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_row_with_no_patch_alive_is_zeros(backend: str) -> None:
    found = Case((2, 2, 2, 9, 4), past=False).run(backend, alive=torch.tensor([[False] * 8, [True] * 8]))
    assert all(bool((x[0] == 0).all()) for x in found)
    assert all(bool(x.isfinite().all()) for x in found)
    assert float(found.entropy[1]) > 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_no_patches_give_nothing(backend: str, attention: str) -> None:
    found = Case((2, 2, 2, 1, 4), attention=attention, ragged=False).run(backend)
    assert found.score.shape == found.average.shape == (2, 0)
    assert found.entropy.tolist() == [0, 0]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_and_similarity_that_vanish_give_no_nan(backend: str, dtype: torch.dtype) -> None:
    case = Case((1, 2, 2, 6, 4), dtype=dtype, ragged=False, past=False)
    case.v = torch.full((1, 2, 6, 4), -1.0, dtype=dtype)
    case.v[:, :, 0] = 20  # its value is unlike any other, and so are its key and query
    found = case.run(backend, cls_query=case.v[:, :, 0], k=case.v, scale=1.0)
    assert all(bool((x == 0).all()) for x in found)


@pytest.mark.parametrize("sharpness", [1e4, -1e4])
def test_huge_logits_do_not_overflow(sharpness: float) -> None:
    case = Case((2, 4, 2, 18, 8), sharpness=sharpness, ragged=False)
    found = case.run()
    # fp32 carries logits of 1e4 to about 1e-3, and so their softmax.
    assert_close(found, case.run("reference"), 1e-2, 1e-2)
    assert all(bool(x.isfinite().all()) for x in found)


def test_two_runs_give_the_same_bits() -> None:
    case = Case((2, 4, 2, 40, 8), dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), case.run(), strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_statistics_have_no_gradients(backend: str) -> None:
    case = Case((1, 2, 2, 5, 4))
    case.v.requires_grad_()
    assert not any(x.requires_grad for x in case.run(backend))


# As an operator -------------------------------------------------------------------------------------------------------
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    made, given = Case((1, 4, 2, 6, 4)), Case((1, 4, 2, 6, 4), attention="given", ragged=False, past=False)
    o = made.options
    everything = (made.v, o["cls_query"], o["k"], 0.5, None, o["alive"], o["average"], 0.5)
    torch.library.opcheck(torch.ops.vlattn.flowcut_statistics, everything)
    bare = (given.v, None, None, 1.0, given.options["cls_attention"], None, None, 0.5)
    torch.library.opcheck(torch.ops.vlattn.flowcut_statistics, bare)


@pytest.mark.parametrize("past", [False, True])
def test_a_compiled_function_gives_what_it_gives_without_compilation(past: bool) -> None:
    case = Case((1, 2, 1, 9, 4), past=past)

    def function(v: torch.Tensor) -> torch.Tensor:
        found = ops.flowcut_statistics(2 * v, **case.options, backend="triton")
        return found.average + found.entropy[:, None] + found.attention

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(case.v), compiled(case.v))


@pytest.mark.parametrize(("attention", "heads"), [("made", 4 + 2), ("given", 2)])
def test_the_flop_counter_counts_a_product_for_keys_and_one_for_values(attention: str, heads: int) -> None:
    with FlopCounterMode(display=False) as counter:
        Case((3, 4, 2, 9, 8), attention=attention).run()
    assert counter.get_total_flops() == 2 * (3 * heads * 9 * 8)


# What is refused ------------------------------------------------------------------------------------------------------
X = torch.zeros(2, 4, 9, 8)
ROW, QUERY = torch.zeros(2, 4, 9), torch.zeros(2, 4, 8)


@pytest.mark.parametrize(
    ("v", "options", "message"),
    [
        (X[0], {"cls_attention": ROW}, r"v: got torch.float32 \(4, 9, 8\); give floating-point numbers"),
        (X, {}, "cls_query, k and scale: give all three, or the attention of CLS as cls_attention"),
        (X, {"cls_query": QUERY, "k": X}, "cls_query, k and scale: give all three"),
        (X, {"cls_attention": ROW, "k": X}, "cls_attention: given beside cls_query or k"),
        (X, {"cls_attention": ROW[..., 1:]}, r"cls_attention: got torch.float32 \(2, 4, 8\)"),
        (
            X,
            {"cls_query": QUERY, "k": X[:, :, 1:], "scale": 1.0},
            "k: got torch.float32 .* give one key for each",
        ),
        (X, {"cls_query": X[:, :, :1], "k": X, "scale": 1.0}, r"cls_query: got \(2, 4, 1, 8\); give \[B, H, D\]"),
        (X, {"cls_query": QUERY[:, :3], "k": X, "scale": 1.0}, "k: its 4 heads do not divide the 3 of q"),
        (X, {"cls_attention": ROW, "alive": ROW[:, 0] > 0}, r"alive: got torch.bool \(2, 9\); give bool \(2, 8\)"),
        (X, {"cls_attention": ROW, "average": ROW[:, 0]}, r"average: got torch.float32 \(2, 9\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(v: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.flowcut_statistics(v, **options)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 2, 4), torch.float64, "has no torch.float64"),
        ((1, 1, 2, 300), torch.float32, "takes heads of at most 256 channels, not 300"),
        ((1, 1, 5000, 1), torch.float32, "takes at most 4096 tokens, not 5000"),
    ],
)
def test_what_the_kernel_does_not_cover_is_refused_where_it_was_asked_for(
    shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    v = torch.zeros(shape, dtype=dtype)
    with pytest.raises(InputError, match=f"backend: the Triton kernel {message}; give backend='reference'"):
        ops.flowcut_statistics(v, cls_attention=torch.zeros(1, 1, shape[2]), backend="triton")
