"""FlowCut's score inside the decoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlattn.interventions.decoder_pruner import top_visual
from vlattn.interventions.flowcut_decoder import decoder_flow_score

Formula = Callable[..., torch.Tensor]
Numbers = Callable[[str], torch.Tensor]


def test_the_score_is_the_one_the_released_code_gives(formula: Formula, numbers: Numbers) -> None:
    q, k = 6 * formula(1, 1, 2, 1, 4), 6 * formula(2, 1, 2, 12, 4)
    value, last = 6 * formula(3, 1, 2, 12, 4), 6 * formula(4, 1, 2, 1, 4)
    visual = torch.ones(1, 12, dtype=torch.bool)
    score = decoder_flow_score(q, k, last, value, visual, 0.5)
    expected = numbers(
        "0.253386 1.287529 0.047172 0.423623 0.593149 1.086178 0.919234 0.681859 0.241001 0.716253 0.918997 0.221990"
    )
    torch.testing.assert_close(score[0], expected, atol=6e-7, rtol=0)
    assert top_visual(score, visual, torch.tensor([5]))[0].nonzero().flatten().tolist() == [1, 5, 6, 9, 10]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_score_of_a_prompt_is_a_loop_over_its_visual_tokens_and_heads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, value, last = (
        torch.randn(2, heads, n, 8, generator=generator).to(dtype) for heads, n in ((4, 1), (2, 11), (2, 11), (2, 1))
    )
    visual = torch.zeros(2, 11, dtype=torch.bool)
    visual[0, 2:7], visual[1, [1, 4, 5, 9]] = True, True
    found = decoder_flow_score(q, k, last, value, visual, 8**-0.5)
    for b in range(2):
        places = visual[b].nonzero().flatten()
        relevance, semantic, size = torch.zeros(3, len(places), dtype=torch.float64)
        for head in range(4):
            keys, values = k[b, head // 2, places].double(), value[b, head // 2, places].double()
            relevance += (keys @ q[b, head, 0].double() / 8**0.5).softmax(0) / 4
            semantic += (values @ last[b, head // 2, 0].double() / 8**0.5).softmax(0) / 4
            size = size + values / 4 if head else values / 4
        expected = (relevance / relevance.sum() + semantic / semantic.sum()) * size.abs().sum(-1)
        torch.testing.assert_close(found[b, places].double(), expected, atol=1e-6, rtol=1e-5)
        assert bool((found[b, ~visual[b]] == 0).all())
