"""No weights of all queries by all keys exist anywhere, at 4096 positions; a mask of them at most, for all heads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlattn.interventions.registry import parse_method

LENGTH = 4096
TEXT = LENGTH - 63 * 63
METHODS = {
    "act": "act:heads=all,theta=0.00001,min_rows=1",
    "act, all rows": "act:heads=all,theta=0.00001,min_rows=1,edit_rows=all",
    "divprune": "divprune:keep=64",
    "fastv": "fastv:keep=64,layer=1",
    "flowcut": "flowcut:keep=64",
    "hiprune": "hiprune:keep=64,object_layer=1",
    "icd": "icd:disturbance=[5,6,7]",
    "m3id": "m3id",
    "opera": "opera:num_beams=2",
    "pai": "pai",
    "paint": "paint:start_layer=0",
    "sid": "sid:layer=1,keep=64",
    "sparsevlm": "sparsevlm:layers=[1],counts=[64]",
    "var": "var:sink_dims=[3,7],tau=1.2,min_visual_mass=0.0,rho_nonsink=0.0,skip_first_layers=0",
    "vcd": "vcd",
    "vhr": "vhr",
}
# Hides keys by a mask, as padding does; torch itself adds it up in numbers, once for all heads.
MASKED = {"sid"}
# One distance for each pair of tokens is what it is about; see its TABLE.
PAIRWISE = {"divprune"}


class Largest(TorchDispatchMode):
    """The most elements that a tensor made in here has: of numbers, and of truth values."""

    numbers = truths = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if leaf.dtype == torch.bool:
                    self.truths = max(self.truths, elements)
                else:
                    self.numbers = max(self.numbers, elements)
        return out


@pytest.fixture(scope="module")
def long(tiny: ModuleType) -> tuple[Any, dict[str, Any]]:
    model = tiny.llava(image_size=63 * 4, layers=2, decoder_layers=4, feature_layer=-1, dtype=torch.float32)
    model.config.text_config.max_position_embeddings = LENGTH + 8
    inputs = tiny.prompts(model, images=(1,), text=TEXT // 2)
    extra = LENGTH - inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.full((1, extra), 7)], 1)
    return model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_method_makes_a_matrix_of_all_positions(long: tuple[Any, dict[str, Any]], name: str) -> None:
    model, inputs = long
    method = parse_method(METHODS[name])
    assert method is not None
    assert inputs["input_ids"].shape == (1, LENGTH)
    with torch.no_grad(), method(model), Largest() as largest:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert LENGTH < largest.numbers <= (LENGTH**2 if name in MASKED | PAIRWISE else LENGTH**2 // 2)
    assert largest.truths <= LENGTH**2


@pytest.mark.slow
def test_the_measure_sees_such_a_matrix_where_there_is_one(long: tuple[Any, dict[str, Any]]) -> None:
    with torch.no_grad(), Largest() as largest:
        long[0](**long[1])
        stock = largest.numbers
        torch.ones(LENGTH, LENGTH).softmax(-1)
    assert stock < LENGTH**2 // 2
    assert largest.numbers == LENGTH**2
