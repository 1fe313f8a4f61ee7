"""The results of `vlattn.eval.bench` for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

NA = "n/a"
Row = Mapping[str, Any]


def bench_tables(results: Row) -> Iterator[RenderableType]:
    """Setting, time, work, stages and floor, and what to mind, in the order in which they are read."""
    yield _setting(results)
    yield time_table(results)
    yield work_table(results)
    yield stage_table(results)
    yield floor_table(results)
    for check in results["neutral"]:
        verdict = "same tokens as vanilla" if check["same_ids"] else "OTHER TOKENS than vanilla"
        yield Text(f"check {check['name']}: {verdict}, first logits within {check['max_logit_difference']:.2g}")
    for warning in results["warnings"]:
        yield Text(f"warning: {warning}", style="yellow")


def _setting(results: Row) -> Text:
    s, machine, attention = results["settings"], results["machine"], results["arms"][0]["attention"]
    peak = results["roofline"]
    lengths = s["prompt_lengths"]
    prompt = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return Text(
        f"{s['model']}, {s['parameters'] / 1e6:,.1f}M parameters, {s['dtype']}, "
        f"attention {attention['decoder']} (decoder), {attention['tower']} (tower)\n"
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads; at best {_si(peak['flops_per_second'])}"
        f"FLOP/s, {_si(peak['bytes_per_second'])}B/s\n"
        f"batch {s['batch']}, prompts of {prompt} positions, {s['new_tokens']} new tokens, {s['repeats']} rounds over "
        f"{s['inputs']} inputs, arms interleaved"
    )


def time_table(results: Row) -> Table:
    """Medians, and ratios to vanilla with their quartiles."""
    table = _table(
        "time",
        "x: times vanilla's, median of rounds, quartiles below; prefill: to the first token, with tower and projector; "
        "decode: the rest",
        ("method", "visual tokens", "prefill ms", "decode ms", "total ms", "tokens/s", "same ids"),
    )
    real = any(row["real_length"] for row in results["arms"])
    if real:
        table.add_column("real ms", justify="right")
    for row in results["arms"]:
        cells = [_time(row, stage) for stage in ("prefill", "decode", "total")]
        extra = [_cell(row["real_length"]["seconds"], row["real_length"]["ratio"])] if real else []
        same = "yes" if row["same_ids_as_vanilla"] else "no"
        table.add_row(_name(row), _tokens(row), *cells, _number(row["tokens_per_second"]), same, *extra)
    return table


def work_table(results: Row) -> Table:
    """What there was to do, and what became of the visual tokens."""
    table = _table(
        "work",
        "below the method: what became of visual tokens; prefill GFLOP: two per multiply-accumulate, by formula and as "
        "PyTorch counts; x: times vanilla's; KV: the cache after the prefill, measured",
        ("method", "prefill GFLOP", "counted", "tower", "decoder", "decode", "KV KiB"),
        width=26,  # of "removed before the decoder"
    )
    measured = results["arms"][0]["memory"]["measured"]
    if measured:
        table.add_column("peak MiB", justify="right")
    for row in results["arms"]:
        ratios, saving = row.get("ratios", {}), row["saving"]
        counted = row["prefill_flops_counted"]["total"]
        name = _name(row)
        if saving is not None:
            name.append(f"\n{saving['text']}", style="yellow" if saving["kind"] == "masked" else "dim")
        table.add_row(
            name,
            f"{row['prefill_flops'] / 1e9:.4g}{_times(ratios.get('prefill'))}",
            NA if counted is None else f"{counted / 1e9:.4g}",
            *(_times(ratios.get(name)).strip() for name in ("tower", "decoder", "decode")),
            f"{row['kv_bytes']['used'] / 1024:,.0f}{_times(ratios.get('kv_bytes'))}",
            *([f"{row['memory']['above'] / 2**20:,.0f}"] if measured else []),
        )
    return table


def stage_table(results: Row) -> Table:
    """Where the time goes, from rounds of their own."""
    table = _table(
        "stages, ms",
        f"medians of {results['settings']['stage_repeats']} separate rounds; prefill here is the decoder's part",
        ("method", "setup", "vision", "projector", "prefill", "decode"),
    )
    for row in results["arms"]:
        table.add_row(_name(row), *(f"{1e3 * row['stages'][s]['median']:.2f}" for s in row["stages"]))
    return table


def floor_table(results: Row) -> Table:
    """Measured time beside the least that this machine needs."""
    steps = results["settings"]["new_tokens"] - 1
    table = _table(
        "floor: the least time for this work, ms",
        "floor: the slower of FLOPs / peak (compute) and bytes / bandwidth (memory), for a prefill and for one decoded "
        "token; read MiB: what that token's step reads, every weight and the cache; pruning shortens the cache",
        ("method", "prefill", "floor", "set by", "token", "floor", "set by", "read MiB"),
    )
    for row in results["arms"]:
        prefill, decode = row["bound"]["prefill"], row["bound"]["decode"]
        cells = [_ms(row["seconds"]["prefill"]["median"]), _ms(prefill["seconds"]), prefill["by"]]
        if steps:
            cells += [_ms(row["seconds"]["decode"]["median"] / steps), _ms(decode["seconds"] / steps), decode["by"]]
            cells.append(f"{decode['bytes'] / steps / 2**20:,.1f}")
        table.add_row(_name(row), *cells)
    return table


def _table(title: str, caption: str, columns: Sequence[str], width: int = 12) -> Table:
    table = Table(
        title=title,
        caption=caption,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(columns[0], overflow="fold", min_width=width)
    for name in columns[1:]:
        text = name in ("set by", "same ids")
        table.add_column(name, justify="left" if text else "right")
    return table


def _name(row: Row) -> Text:
    return Text(row["name"])


def _tokens(row: Row) -> str:
    """Left at the end, and the mean over decoder layers where that is another number."""
    tokens = row["visual_tokens"]
    final, average = _number(tokens["final"]), _number(tokens["average"])
    return final if final == average else f"{final}\n[dim]mean {average}[/dim]"


def _time(row: Row, stage: str) -> str:
    return _cell(row["seconds"][stage], row["ratio"][stage]) if stage in row["seconds"] else NA


def _cell(seconds: Row, ratio: Row) -> str:
    return f"{_ms(seconds['median'])} {ratio['median']:.2f}x\n[dim]{ratio['lower']:.2f}-{ratio['upper']:.2f}[/dim]"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" {ratio:.2f}x"


def _number(value: float | None) -> str:
    if value is None:
        return NA
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
