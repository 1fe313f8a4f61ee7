"""The model: its size, what it may and may not depend on, and its loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.gaze.baselines import object_path
from vlattn.gaze.oat import OAT, make_oat
from vlattn.gaze.oat_batch import OATBatch, OATData, Search, search_of, searches_of
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.trial import Fixation, Trial

SIZES = [(2, 11), (3, 9), (6, 14)]


def batch_of(oat: Any, *sizes: tuple[int, int], length: int = 5) -> OATBatch:
    data = oat.shelves(*sizes)
    return data.batch([oat.search(data, n, length) for n in range(len(sizes))])


def test_the_published_model_has_as_many_parameters_as_the_reference_has_live_ones() -> None:
    model = make_oat()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(counts.values()) == 18_255_843
    assert counts["appearance"] == 374_752
    assert counts["encoder"] == 4 * 1_577_984
    assert counts["decoder"] == 4 * 2_629_632
    assert counts["head"] == 1_050_624 + 3


def test_weights_are_xavier_uniform_and_depend_on_the_seed_alone() -> None:
    model = make_oat(OATConfig(encoder_layers=1, decoder_layers=1), seed=3)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() > 100:
            receptive = parameter[0, 0].numel()
            bound = (6 / ((parameter.shape[0] + parameter.shape[1]) * receptive)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
    torch.manual_seed(9)
    again = make_oat(OATConfig(encoder_layers=1, decoder_layers=1), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_the_same_weights_score_any_number_of_objects(oat: Any, size: tuple[int, int]) -> None:
    model, batch = oat.model(), batch_of(oat, size, size)
    logits = model(batch)
    assert logits.shape == (2, 6, size[0] * size[1] + 2)
    assert torch.equal(logits[..., -1], model.head.readout.bias.expand(2, 6))


def test_a_single_pointer_head_has_no_readout_and_padding_scores_zero(oat: Any) -> None:
    model = oat.model(pointer_heads=1)
    assert model.head.readout is None
    assert not model(batch_of(oat, (2, 4)))[..., -1].any()


@torch.no_grad()
def test_pointer_scores_are_those_of_the_formula(oat: Any) -> None:
    model = oat.model()
    encoded, decoded = torch.randn(1, 5, 96), torch.randn(1, 3, 96)
    found = model.head(decoded, model.head.read_keys(encoded))[0]
    weights, bias = model.head.readout.weight[0], model.head.readout.bias
    for t in range(3):
        for i in range(5):
            scores = [
                (a(encoded[0, i]) @ b(decoded[0, t])) / 96**0.5
                for a, b in zip(model.head.keys, model.head.queries, strict=True)
            ]
            assert float(found[t, i]) == pytest.approx(
                float(weights[0] * scores[0] + weights[1] * scores[1] + bias), abs=1e-4
            )


def test_permuting_objects_permutes_their_scores_and_leaves_the_end(oat: Any) -> None:
    model, batch = oat.model(), batch_of(oat, (3, 9))
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    moved = replace(
        batch, index=batch.index[:, order], cells=batch.cells[:, order], target=place[batch.target],
        paths=place[batch.paths],
    )  # fmt: skip
    before, after = model(batch), model(moved)
    torch.testing.assert_close(after[..., :27], before[..., order], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[..., 27:], before[..., 27:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", [0, 2, 4])
def test_a_fixation_changes_nothing_before_it(oat: Any, changed: int) -> None:
    model, batch = oat.model(), batch_of(oat, (2, 11))
    paths = batch.paths.clone()
    paths[:, changed] = (paths[:, changed] + 1) % 22
    before, after = model(batch), model(replace(batch, paths=paths))
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])  # logits[0] come from the beginning alone
    assert (before[:, changed + 1] != after[:, changed + 1]).any()


def test_only_fixations_on_the_target_are_flagged(oat: Any) -> None:
    model, batch = oat.model(), batch_of(oat, (2, 4))
    target = int(batch.target)
    tokens = model.encode(batch).tokens[0, :, 48:]  # positions
    for index, (row, column) in enumerate(batch.cells[0].tolist()):
        expected = model.positions(torch.tensor([row, column, float(index == target)]))
        torch.testing.assert_close(tokens[index], expected)
    for special in (8, 9, 10):
        torch.testing.assert_close(tokens[special], model.positions(torch.tensor([1.0, 2.0, 0.0])))


def encoder_input(model: OAT, batch: OATBatch) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode(batch)
    handle.remove()
    return seen[0][0]


def test_the_target_token_is_the_targets_look_and_cell_with_the_flag(oat: Any) -> None:
    model, batch = oat.model(), batch_of(oat, (2, 4))
    tokens, target = encoder_input(model, batch), int(batch.target)
    assert torch.equal(tokens[8, :48], tokens[target, :48])
    row, column = batch.cells[0, target].tolist()
    torch.testing.assert_close(tokens[8, 48:], model.positions(torch.tensor([row, column, 1.0])))
    torch.testing.assert_close(tokens[target, 48:], model.positions(torch.tensor([row, column, 0.0])))


def test_a_hidden_target_position_is_nowhere(oat: Any) -> None:
    model, batch = oat.model(reveal_target_position=False), batch_of(oat, (2, 4))
    tokens = encoder_input(model, batch)
    torch.testing.assert_close(tokens[8, 48:], model.positions(torch.tensor([-1.0, -1.0, 1.0])))
    assert torch.equal(tokens[8, :48], tokens[int(batch.target), :48])


def test_encoder_and_decoder_layers_are_those_of_pytorch(oat: Any) -> None:
    model, batch = oat.model(), batch_of(oat, (2, 4), (2, 3))
    memory = model.encode(batch)
    sizes = {"dropout": 0.0, "batch_first": True}
    x = torch.cat((encoder_input(model, batch)[None], torch.randn(1, 9, 96)))
    hidden = torch.tensor([[False] * 9, [False] * 6 + [True] * 2 + [False]])
    expected = mine = x
    for layer in model.encoder:
        other = torch.nn.TransformerEncoderLayer(96, 4, 32, **sizes).eval()
        other.load_state_dict(layer.state_dict())
        mine, expected = layer(mine, ~hidden[:, None, None]), other(expected, src_key_padding_mask=hidden)
    torch.testing.assert_close(mine[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mine[1, :6], expected[1, :6], atol=1e-5, rtol=0)
    ahead = torch.nn.Transformer.generate_square_subsequent_mask(6)
    source, y = mine, torch.randn(2, 6, 96)
    expected = mine = y
    for layer in model.decoder:
        other = torch.nn.TransformerDecoderLayer(96, 4, 32, **sizes).eval()
        other.load_state_dict(layer.state_dict())
        mine = layer(mine, layer.multihead_attn.keys_values(source), memory.visible)
        expected = other(expected, source, tgt_mask=ahead, memory_key_padding_mask=hidden)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("parity", [False, True])
def test_padding_changes_neither_scores_nor_loss(oat: Any, parity: bool) -> None:
    model, data = oat.model(parity=parity), oat.shelves((2, 4), (3, 4), (2, 3))
    searches = [oat.search(data, 0, 2), oat.search(data, 1, 7), oat.search(data, 2, 4), oat.search(data, 1, 1)]
    together = data.batch(searches)
    logits = model(together)
    total, count = 0.0, 0
    for row, one in enumerate(searches):
        alone = data.batch([one])
        single = model(alone)[0]
        objects, length = alone.objects, len(one.path or ()) + 1
        torch.testing.assert_close(logits[row, :length, :objects], single[:, :objects], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[row, :length, 12], single[:, objects], atol=1e-5, rtol=0)  # the end
        assert (logits[row, :, objects:12] == -torch.inf).all()
        total, count = total + float(model.loss(alone)) * length, count + length
    assert float(model.loss(together)) == pytest.approx(total / count, abs=1e-5)


@torch.no_grad()
def test_training_leaves_out_what_generation_cannot_choose_unless_for_parity(oat: Any) -> None:
    batch = batch_of(oat, (2, 4))
    logits = oat.model()(batch)[0]
    plain = F.cross_entropy(logits, batch.wanted[0])
    assert float(oat.model(parity=True).loss(batch)) == pytest.approx(float(plain), abs=1e-6)
    logits[:, 9] = -torch.inf
    logits[0, 8] = -torch.inf
    assert float(oat.model().loss(batch)) == pytest.approx(float(F.cross_entropy(logits, batch.wanted[0])), abs=1e-6)


def test_gradients_reach_every_parameter_and_are_finite(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((2, 4), (2, 3))
    model.loss(data.batch([oat.search(data, 0, 3), oat.search(data, 1, 5)])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_a_scene_of_one_object_works(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((1, 1))
    assert bool(model.loss(data.batch([Search("0", 0, (0,))])).isfinite())


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_other_tables_work(oat: Any, positions: str) -> None:
    assert bool(oat.model(positions=positions, table_steps=3)(batch_of(oat, (2, 4))).isfinite().all())


def test_a_linear_head_knows_one_number_of_objects(oat: Any) -> None:
    model = oat.model(head="linear", objects=8)
    assert model(batch_of(oat, (2, 4))).shape == (1, 6, 10)
    with pytest.raises(InputError, match="objects: got a scene of 6 for a linear head of 8"):
        model(batch_of(oat, (2, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads: got 5"),
        ({"head": "softmax"}, "head: got"),
        ({"head": "linear"}, "objects: got None"),
        ({"appearance": "features", "features": None}, "features: got None"),
        ({"rows": 40, "dim": 96}, "rows: got 40; dim=96 has room for 16"),
        ({"dropout": 1.5}, "dropout: got 1.5"),
        ({"sigma": 0.0}, "sigma: got 0"),
        ({"parity": 1}, "parity: got 1"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OATConfig(**changes)


# Batches --------------------------------------------------------------------------------------------------------------
def test_a_scene_that_comes_twice_is_looked_at_once(oat: Any) -> None:
    data = oat.shelves((2, 4), (2, 3))
    batch = data.batch([oat.search(data, n, 3) for n in (0, 1, 0)])
    assert batch.looks.shape == (14, oat.features)
    assert torch.equal(batch.index[0], batch.index[2])
    assert batch.present is not None
    assert batch.present.sum(1).tolist() == [8, 6, 8]


def test_inputs_begin_and_wanted_end(oat: Any) -> None:
    data = oat.shelves((2, 3))
    batch = data.batch([Search("0", 1, (4, 5)), Search("0", 1, (2, 2, 0))])
    assert batch.inputs.tolist() == [[8, 4, 5, 7], [8, 2, 2, 0]]
    assert batch.wanted.tolist() == [[4, 5, 6, 7], [2, 2, 0, 6]]


def test_a_batch_without_paths_says_so_when_they_are_asked_for(oat: Any) -> None:
    batch = oat.shelves((2, 3)).batch([Search("0", 1), Search("0", 1, (1,))])
    with pytest.raises(InputError, match="paths: the batch has none"):
        _ = batch.inputs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "searches: got none"),
        ([Search("nope", 0)], "scene 'nope' is not"),
        ([Search("0", 6)], "target 6 in scene '0' of 6 objects"),
        ([Search("0", 0, ())], "path \\[\\] in scene"),
        ([Search("0", 0, (1, -1))], "path \\[1, -1\\]"),
    ],
)
def test_bad_searches_are_refused(oat: Any, asked: list[Search], message: str) -> None:
    with pytest.raises(InputError, match=message):
        oat.shelves((2, 3)).batch(asked)


def test_trials_without_target_or_fixations_are_left_out_and_fixations_on_nothing_refused() -> None:
    here = (Fixation(1, 1),)
    good = Trial("a", "s", "x", "p", here, (0,), target_object=0)
    absent = replace(good, id="b", target_object=None)
    empty = replace(good, id="c", fixations=(), objects=())
    searches, trials = searches_of([good, absent, empty])
    assert (searches, trials) == ([Search("s", 0, (0,))], [good])
    with pytest.raises(InputError, match="objects is missing or has -1"):
        search_of(replace(good, objects=(-1,)))
    assert object_path(good) == [0]


def test_data_is_what_the_set_holds(oat: Any) -> None:
    data: OATData = oat.shelves((2, 3))
    np.testing.assert_array_equal(
        data.batch([Search("0", 0)]).cells[0].numpy(), [[r, c] for r in (0, 1) for c in range(3)]
    )
