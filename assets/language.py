"""What is said about the scenes: questions, answers, captions, and the vocabulary and tokenizer that cover them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from vlattn.assets.scenes import BACKGROUNDS, CONTEXTS, NAMES, SIZE, Placed, Scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
POSITIONS = ("on the left", "in the middle", "on the right")
NO_ARTICLE = {"scissors", "skis", "broccoli"}
IRREGULAR = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "bus": "buses"}

SHORT_PROMPTS = (
    "Describe the image.",
    "Describe this image.",
    "Generate a short caption of the image.",
    "Provide a one-sentence caption for the provided image.",
    "What is in the image?",
)
DETAIL_PROMPTS = (
    "Please describe this image in detail.",
    "Describe this image in detail.",
    "Please help me describe the image in detail.",
)
ONE_WORD = "Answer the question using a single word or phrase."

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def plural(name: str) -> str:
    if name in NO_ARTICLE:
        return name
    if name in IRREGULAR:
        return IRREGULAR[name]
    return name + ("es" if name.endswith(("ch", "sh", "ss", "s")) else "s")


def position(placed: Placed) -> str:
    x = placed.center[0] / SIZE
    return POSITIONS[0] if x < 0.38 else POSITIONS[2] if x > 0.62 else POSITIONS[1]


def phrase(name: str, count: int) -> str:
    if count > 1:
        return f"{NUMBERS[count]} {plural(name)}"
    return name if name in NO_ARTICLE else f"{article(name)} {name}"


def listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def grouped(scene: Scene) -> list[tuple[str, list[Placed]]]:
    """Objects by category, from left to right by each category's leftmost member."""
    groups: dict[str, list[Placed]] = {}
    for placed in sorted(scene.objects, key=lambda o: o.center):
        groups.setdefault(NAMES[placed.category], []).append(placed)
    return list(groups.items())


def short_caption(scene: Scene) -> str:
    return listing([phrase(name, len(members)) for name, members in grouped(scene)]) + "."


def detailed_caption(scene: Scene) -> str:
    parts = []
    for name, members in grouped(scene):
        where = f" {position(members[0])}" if len(members) == 1 else ""
        parts.append(phrase(name, len(members)) + where)
    return f"The image shows {listing(parts)}."


def yes_no_question(name: str) -> str:
    return f"Is there {article(name)} {name} in the image?"


def yes_no_turns(rng: np.random.Generator, scene: Scene, n: int) -> list[tuple[str, str, int]]:
    """`n` turns (question, answer, category): half yes; a quarter of the no's name what goes with the scene."""
    present = sorted({o.category for o in scene.objects})
    near = [c for context in CONTEXTS if set(context) & set(present) for c in context if c not in present]
    anywhere = [c for c in range(len(NAMES)) if c not in present]
    turns = []
    for _ in range(n):
        if rng.random() < 0.5:
            category, answer = present[rng.integers(len(present))], "yes"
        else:
            pool = near if near and rng.random() < 0.25 else anywhere
            category, answer = pool[rng.integers(len(pool))], "no"
        suffix = "\n" + ONE_WORD if rng.random() < 0.2 else ""
        turns.append((yes_no_question(NAMES[category]) + suffix, answer, category))
    return turns


def other_turns(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """A count, a place where an object is the only one of its kind, a short caption and a detailed one."""
    counts = Counter(o.category for o in scene.objects)
    present = list(counts)
    category = present[rng.integers(len(present))] if rng.random() < 0.85 else int(rng.integers(len(NAMES)))
    turns = [(f"How many {plural(NAMES[category])} are in the image?", NUMBERS[counts.get(category, 0)])]
    single = [o for o in scene.objects if counts[o.category] == 1]
    if single:
        placed = single[rng.integers(len(single))]
        turns.append((f"Where is the {NAMES[placed.category]}?", position(placed)))
    turns.append((SHORT_PROMPTS[rng.integers(len(SHORT_PROMPTS))], short_caption(scene)))
    turns.append((DETAIL_PROMPTS[rng.integers(len(DETAIL_PROMPTS))], detailed_caption(scene)))
    return turns


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
GENERAL_WORDS = """
it he she they this that these those there here is are was were be do does did can could will would should
have has not no yes of in on at to for from with by about into over under near next behind front between left
right top bottom middle center what which who where when why how many much any some all each and or but if
then than as so very just me you your my we us our please help describe tell show see look looks looking shown
visible picture photo image scene object objects thing things background color colour detail short long
sentence word words phrase single one-sentence caption provided provide generate answer question using give
list name count number find locate a an the i also only big small large little red orange black
""".split()  # noqa: SIM905


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level fast tokenizer: any case, any spacing, unknown words to `<unk>`, exact spacing when decoded.

    Words carry the leading space as `▁`, punctuation stands alone. The vocabulary is what the templates can say, plus
    common question words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    texts = [*SHORT_PROMPTS, *DETAIL_PROMPTS, ONE_WORD, "What color is the background?"]
    texts += ["The image shows, and. The background is"]
    texts += [*NAMES, *(plural(name) for name in NAMES), *NUMBERS, *POSITIONS, *BACKGROUNDS, *GENERAL_WORDS]
    texts += ["How many are in the image? Where is the? Is there an in the image? USER: ASSISTANT:"]
    pieces = [p for text in texts for p, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*SPECIAL, "▁", *"?.,:;!-'\"()", *pieces]))}

    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizer
    core.pre_tokenizer = splitter
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
