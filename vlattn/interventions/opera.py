"""OPERA: beams that distrust tokens which others lean on too much, and go back to choose again.

"OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
Retrospection-Allocation", CVPR 2024, arXiv 2311.17911.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlattn.checks import require_bool, require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.opera_search import Search
from vlattn.interventions.opera_stream import RowReader, Stream
from vlattn.models.adapter import Adapter
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace


@dataclass(frozen=True)
class OPERA(Intervention):
    """OPERA: beam search with a penalty on over-trust, which returns to where a summary token took over.

    "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
    Retrospection-Allocation", CVPR 2024, arXiv 2311.17911. Inside the context the model's `generate` is this search;
    everything else of the model is as it was. Candidates of each beam are run through the model before one is chosen.
    In the last layer, the strongest head's attention of each generated token to those before it is made to sum to 1
    (with the prompt) and scaled; the largest product down a column is the penalty of the candidate whose row ends it.
    The first tokens get what they have on the image as a reward instead. Where one column has won more than
    `threshold` times on every beam, the search goes back to the token of that column and takes other tokens there.

    Scores are kept in fp32 as sums of logarithms; the released code's are in half precision, so a penalty is at most
    65504. Logits processors act before candidates are chosen, as in stock beam search. Tokens other than candidates
    cannot be chosen at all; the released code leaves them at -999. Ruled-out tokens are forgotten behind the place
    that the search went back to, and a history of winning columns follows its beam. Each prompt of a batch goes back
    for itself, while the others wait. Sampling, assisted generation, streamers, static caches and whatever else this
    search cannot do are refused by name. In the trace's notes, `rollbacks` has for each prompt the pairs (from, to) in
    generated tokens, and `forwards` counts runs of the model: two for each token where OPERA is alone on the model,
    1 + `num_attn_candidates` beside another method.

    num_beams: beams of each prompt, at least 2.
    scale_factor: what attention weights are multiplied by; a weight makes its column's product grow above 1 / this.
    threshold: how often a column may win before the search goes back; infinity for never.
    num_attn_candidates: tokens of each beam that are tried, and how often the search may go back to one place. With
        fewer than `num_beams` some beams stay empty; with 1 the penalty cannot change a choice.
    penalty_weights: factor of the penalty.
    window: how many of the last generated tokens have columns, are counted in the history, and can be gone back to.
    warmup: the first tokens, which get a reward for looking at the image instead of the penalty, and which the search
        does not go back to.
    score_scale: factor of the products that the released code has beside `scale_factor`.
    renormalize: whether the candidates of a beam share all its probability, as in the released code; False keeps their
        log-probabilities over the vocabulary, and lets a single candidate feel the penalty.
    monotone: never go back to before a place that the search went back to earlier; the released code has this test,
        switched off.
    """

    num_beams: int = 5
    scale_factor: float = 50.0
    threshold: float = 15
    num_attn_candidates: int = 5
    penalty_weights: float = 1.0
    window: int = 512
    warmup: int = 10
    score_scale: float = 1e-7
    renormalize: bool = True
    monotone: bool = False

    place = "decoder"

    def __post_init__(self) -> None:
        require_count("num_beams", self.num_beams, 2)
        require_count("num_attn_candidates", self.num_attn_candidates)
        require_count("window", self.window)
        require_count("warmup", self.warmup, 0)
        require_number("threshold", self.threshold, 0)
        require_number("penalty_weights", self.penalty_weights, 0)
        for name in ("scale_factor", "score_scale"):
            require_number(name, getattr(self, name), 0)
            if not getattr(self, name):
                raise InputError(f"{name}: got 0, by which every product would be 0; give a number above 0")
        require_bool("renormalize", self.renormalize)
        require_bool("monotone", self.monotone)
        if self.num_attn_candidates < self.num_beams:
            warnings.warn(
                f"num_attn_candidates: {self.num_attn_candidates} is less than num_beams, {self.num_beams}, so some "
                "beams stay empty at the first token; give at least as many candidates as beams",
                stacklevel=3,
            )

    @classmethod
    def refuses(cls, family: type[Adapter]) -> str | None:
        if family.masks_above_decoder:
            return "it takes tokens back from the cache, which layers with a sliding window do not allow"
        return None

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        model: Any = session.model
        if not hasattr(model, "generate"):
            raise InputError(
                f"model: {type(model).__name__} has no generate, which OPERA takes the place of; enter every context "
                "with the model that has the language head"
            )
        if "generate" in vars(model):
            raise InputError(
                "model: its generate has been replaced already, by another OPERA or by hand; only one can act"
            )
        reader = RowReader()
        session.attention.add([len(session.adapter.decoder_layers) - 1], reader, hooks)
        model.generate = _generate_by(self, session, reader, trace)  # on this model alone, not its class
        hooks.also(lambda: vars(model).pop("generate", None))


def _generate_by(method: OPERA, session: Session, reader: RowReader, trace: Trace) -> Callable[..., Any]:
    """`generate` of a model with this search in it; the model's own behind a shut gate."""
    model: Any = session.model
    stock = model.generate
    names = inspect.signature(stock)

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **arguments: Any,
    ) -> Any:
        stream = Stream(session, reader, model, input_ids, arguments)
        search = Search(method, stream, generation_config)
        output = search.run(logits_processor, stopping_criteria)
        trace.notes["rollbacks"] = [list(prompt.rollbacks) for prompt in search.prompts]
        trace.notes["forwards"] = stream.forwards
        return output

    def generate(*args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, decoding as OPERA does."""
        if session.gate.held:
            return stock(*args, **kwargs)
        given = dict(names.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if not session.sees_images(given):
            return stock(*args, **kwargs)
        _refuse(method, model, given)
        return stock(**{**given, "num_beams": method.num_beams, "custom_generate": decode})

    return generate


_WHY = {
    "do_sample": "OPERA searches with beams; give do_sample=False",
    "custom_generate": "OPERA is one itself; leave it out",
    "assistant_model": "there is no assisted generation in this search; leave it out",
    "prompt_lookup_num_tokens": "there is no assisted generation in this search; leave it out",
    "assistant_early_exit": "there is no assisted generation in this search; leave it out",
    "streamer": "beams are not known before the end; leave it out",
    "synced_gpus": "the search does not run in step with other processes; leave it out",
    "guidance_scale": "the search has no second stream; leave it out",
    "prefill_chunk_size": "the prompt is taken whole; leave it out",
    "low_memory": "beams run together; leave it out",
    "stop_strings": "give stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)] instead",
    "dola_layers": "OPERA is a decoding of its own; leave it out",
    "penalty_alpha": "OPERA is a decoding of its own; leave it out",
    "constraints": "the search has no constraints; leave it out",
    "force_words_ids": "the search has no constraints; leave it out",
    "output_scores": "steps are not kept; return_dict_in_generate=True gives sequences_scores",
    "output_logits": "steps are not kept; return_dict_in_generate=True gives sequences_scores",
    "output_attentions": "steps are not kept; leave it out",
    "output_hidden_states": "steps are not kept; leave it out",
}


def _refuse(method: OPERA, model: Any, given: dict[str, Any]) -> None:
    """Raise for what a call of `generate` asks and this search cannot do."""
    configs = [config for config in (given.get("generation_config"), model.generation_config) if config is not None]

    def asked(name: str) -> Any:
        """A setting as generate would see it: of the call, else of the config given, else of the model's."""
        known = [given.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in known if value is not None), None)

    for name, why in _WHY.items():
        if (value := asked(name)) not in (None, False) and not (name == "guidance_scale" and value == 1):
            shown = value if isinstance(value, int | float | str) else type(value).__name__
            raise InputError(f"{name}: got {shown}; {why}")
    if asked("use_cache") is False:
        raise InputError("use_cache: got False; OPERA needs the cache, leave it out")
    if asked("cache_implementation") not in (None, "dynamic"):
        raise InputError(
            f"cache_implementation: got {asked('cache_implementation')!r}; OPERA takes tokens back from the cache, "
            "give 'dynamic'"
        )
    beams = given.get("num_beams") or next((c.num_beams for c in configs if c.num_beams not in (None, 1)), None)
    if beams not in (None, method.num_beams):
        raise InputError(
            f"num_beams: got {beams}, but this is OPERA(num_beams={method.num_beams}); leave it out here, or give "
            f"OPERA(num_beams={beams})"
        )
