"""One row of the page per situation: the cells for kvpress and for kvcompress, from the results."""

from __future__ import annotations

from words import (
    ALL,
    NAMED,
    RIGHT,
    Record,
    cell,
    errors,
    failed,
    most,
    names,
    number,
    only,
    ran,
    span,
)


def storage(kv: Record, own: Record) -> tuple[str, str]:
    def part(records: Record) -> str:
        return span(v["bytes"] / v["full_bytes"] for v in records.values())

    freed = {k: v for k, v in kv.items() if v["bytes"] < v["full_bytes"]}
    same = {k: v for k, v in kv.items() if v["bytes"] == v["full_bytes"]}
    masked = {k: v for k, v in same.items() if "kept" in v}
    exact = {k: v for k, v in own.items() if ", int" not in k}
    coded = only(own, ", int")
    cost = max(v["bytes"] / v["full_bytes"] / v["kept"] for v in exact.values())
    shown = ", ".join(
        f"{k.split(', ')[1]} {v['bytes'] / v['full_bytes']:.3f}" for k, v in coded.items()
    )
    return (
        cell(
            f"freed: {names(freed)}: {part(freed)} of the bytes for half of the tokens",
            f"not freed: {names(same)}: {part(same)} of the bytes"
            f" ({span(v['kept'] for v in masked.values())} of the tokens unmasked)",
            f"error {most({k: v for k, v in kv.items() if 'gap' in v})}",
        ),
        cell(
            f"freed in all {len(own)} plans, per-head ones ({names(only(exact, 'per head'))}) too:"
            f" {part(exact)} of the bytes for {span(v['kept'] for v in exact.values())} of the"
            f" tokens; positions and scores cost up to {cost - 1:.1%} on top",
            f"half of the tokens in codes: {shown} of the fp32 bytes",
            f"error of the uncoded plans {most(exact)}",
        ),
    )


def per_layer(kv: Record, own: Record) -> tuple[str, str]:
    def ways(records: Record) -> str:
        """``PyramidKV, sdpa, question`` and its like for every press, as one ``sdpa question``."""
        found: dict[str, list[str]] = {}
        for name in records:
            press, way = name.split(", ", 1)
            found.setdefault(way.replace(", ", " "), []).append(press)
        return "; ".join(f"{way} ({names(presses)})" for way, presses in found.items())

    good = ran(kv)
    return (
        cell(
            f"runs: {ways(good)}, {most({k: v for k, v in good.items() if 'gap' in v})}",
            f"fails: {ways(failed(kv))}: `{next(iter(failed(kv).values()))['error']}` and the like",
            "its wrapper for budgets per layer says that it needs flash attention",
        ),
        cell(
            f"{len(ran(own))} of {len(own)} run,"
            f" {most({k: v for k, v in ran(own).items() if 'gap' in v})}",
            errors(own),
        ),
    )


def padding(kv: Record, own: Record) -> tuple[str, str]:
    good, mine = ran(kv), ran(own)
    shares = [s for v in good.values() for s in v["pad_share"]]
    return (
        cell(
            f"short row: {span(v['short_row_gap'] for v in good.values())} away from itself alone"
            f" ({span(v['generate_gap'] for v in good.values())} through `generate`); at the next"
            f" step it sees {max(v['visible_next_step'] for v in good.values())} of its tokens",
            f"pads are {min(shares):.0%} to {max(shares):.0%} of what it keeps"
            f" ({max(v['least_pad_share'] for v in good.values()):.0%} is the least where all rows"
            " keep equally many)",
            f"long row: {most(good, 'long_row_gap')}",
            errors(kv),
        ),
        cell(
            f"short row: {most(mine, 'short_row_gap')} ({most(mine, 'generate_gap')} through"
            " `generate`)",
            f"pads kept: {max(s for v in mine.values() for s in v['pad_share']):.0%}",
            f"long row: {most(mine, 'long_row_gap')}",
            errors(own),
        ),
    )


def chunked(kv: Record, own: Record) -> tuple[str, str]:
    asked = next(iter(kv.values()))["asked"]
    held = sorted({t for v in ran(kv).values() for t in v["tokens"]})
    mine = sorted({t for v in ran(own).values() for t in v["tokens"]})
    parts, whole = only(own, "per_chunk"), only(own, "after_prefill")
    return (
        cell(
            f"asked for {asked} tokens, holds {names(map(str, held))}: only the first chunk is"
            f" compressed (what it holds is attended exactly, {most(kv)})",
            f"{span(v['gap_to_one_shot'] for v in kv.values())} away from one-shot prefill",
        ),
        cell(
            f"asked for {asked} tokens, holds {names(map(str, mine))}",
            f"`per_chunk` (default) chooses earlier, so it is"
            f" {span(v['gap_to_one_shot'] for v in parts.values())} away from one-shot prefill; its"
            f" own kept set is attended exactly, {most(parts)}",
            f"`after_prefill` equals one-shot prefill, {most(whole, 'gap_to_one_shot')}",
        ),
    )


def second_turn(kv: Record, own: Record) -> tuple[str, str]:
    trained, random = only(kv, "trained"), only(kv, "random weights")
    broken = failed(random)
    text = next(iter(broken.values()))["error"] if broken else ""
    shortest = min((int(k.rsplit(" ", 1)[1]) for k in broken), default=0)
    stopped = sorted({k.split(", ")[0] for k in broken})
    return (
        cell(
            f"trained model: {len(ran(trained))} of {len(trained)} run, {most(ran(trained))}",
            f"random weights: {len(ran(random))} of {len(random)} run, {most(ran(random))};"
            f" {names(stopped)} fails from {shortest} tokens on: `{text}`",
            "the turn itself is never compressed",
        ),
        cell(
            f"{len(ran(own))} of {len(own)} run, {most(ran(own))}, on both models",
            "the turn is compressed too: as many tokens held after it as before it",
            errors(own),
        ),
    )


def long_generation(kv: Record, own: Record) -> tuple[str, str]:
    def line(records: Record) -> str:
        top = max(v["most_tokens"] for v in records.values())
        return f"asked for {next(iter(records.values()))['asked']} tokens, never more than {top}"

    return (
        cell(f"`DecodingPress`: {line(kv)} (it evicts at intervals)"),
        cell(f"{line(own)} (it evicts at every step), {most(own)}"),
    )


def interleaved(kv: Record, own: Record) -> tuple[str, str]:
    good = {k: v for k, v in kv.items() if v["gap"] == 0}
    bad = {k: v for k, v in kv.items() if v["gap"] > 0}
    return (
        cell(
            f"unchanged: {names(good)}",
            f"changed by {span(v['gap'] for v in bad.values())}: {names(bad)}: what they mask is"
            " kept on the model, not in the cache",
        ),
        cell(f"unchanged in all {len(own)} plans ({most(own)})"),
    )


def intact(kv: Record, own: Record) -> tuple[str, str]:
    good = {k: v for k, v in kv.items() if v["changed"] == 0}
    bad = {k: v for k, v in kv.items() if v["changed"] > 0}
    largest = max(v["largest_key"] for v in bad.values())
    before = max(v["largest_key_before"] for v in bad.values())
    return (
        cell(
            f"intact: {names(good)}",
            f"{span(v['changed'] for v in bad.values())} of the stored keys overwritten (largest"
            f" {before:.0f} → {largest:.0f}): {names(bad)}",
        ),
        cell(
            f"{span(v['changed'] for v in own.values())} of the tokens that stay changed, in all"
            f" {len(own)} plans; by design the new token takes the place of a victim:"
            f" {max(v['evicted'] for v in own.values()):.1%} of the tokens go"
        ),
    )


def reuse(kv: Record, own: Record) -> tuple[str, str]:
    return (
        cell(f"equal ({most(kv)}): {names(kv)}; its pipeline takes several questions at once"),
        cell(f"equal ({most(own)}) from a `deepcopy`, in all {len(own)} plans"),
    )


def save_load(kv: Record, own: Record) -> tuple[str, str]:
    good = {k: v for k, v in ran(kv).items() if v["gap"] < 1e-3}
    bad = {k: v for k, v in ran(kv).items() if v["gap"] >= 1e-3}
    extra = max(v["file_bytes"] / v["bytes"] for v in ran(own).values()) - 1
    return (
        cell(
            "no function for it; tensors saved by hand:",
            f"exact: {'; '.join(good)}",
            f"{span(v['gap'] for v in bad.values())} away: {'; '.join(bad)}",
        ),
        cell(
            f"{len(ran(own))} of {len(own)} load, with and without position_ids, {most(ran(own))};"
            f" the file is at most {extra:.1%} larger than the cache",
            errors(own),
        ),
    )


def quantized_cache(kv: Record, own: Record) -> tuple[str, str]:
    scored = {k: v for k, v in ran(kv).items() if "agreement" in v}
    ada = only(kv, "AdaKV")
    plain = {k.replace(" + AdaKV(SnapKV)", ""): v for k, v in ada.items()}
    saved = [1 - v["bytes"] / kv[k]["bytes"] for k, v in plain.items()]
    own_scored = only(own, "window votes")
    low = min(v["agreement"] for v in scored.values())
    high = max(v["agreement"] for v in scored.values())
    return (
        cell(
            f"quantizes, then scores: {low:.1%} to {high:.1%} of the kept tokens are those that"
            " exact keys choose",
            f"AdaKV frees {max(saved):.0%} of a quantized cache",
            "bytes and errors: table below",
        ),
        cell(
            f"scores, evicts, then quantizes once:"
            f" {min(v['agreement'] for v in own_scored.values()):.1%} of the kept tokens are those"
            " that exact keys choose",
            "bytes and errors: table below",
        ),
    )


def quantized_weights(kv: Record, own: Record) -> tuple[str, str]:
    good = sorted({k.split(", ")[1] for k in ran(kv)})
    return (
        cell(f"{names(good)}: {most(ran(kv))}", errors(kv)),
        cell(
            f"{len(ran(own))} of {len(own)} run, {most(ran(own))}; it has no score that weighs"
            " values by the output projection",
            errors(own),
        ),
    )


def eager(kv: Record, own: Record) -> tuple[str, str]:
    return (
        cell(f"{names(ran(kv))}: {most(ran(kv))}", errors(kv)),
        cell(f"{names(ran(own))}: {most(ran(own))} (it attends by itself)", errors(own)),
    )


def positions(kv: Record, own: Record) -> tuple[str, str]:
    def lines(records: Record) -> list[str]:
        return [
            f"{name}: {number(v['gap'])}"
            + (f" (position {v['next_position']})" if "next_position" in v else "")
            for name, v in ran(records).items()
        ]

    return cell(lines(kv), errors(kv)), cell(lines(own), errors(own))


def offline(kv: Record, own: Record) -> tuple[str, str]:
    memory, folder = only(kv, "from a configuration"), only(kv, "in a folder")
    short = {k.rsplit(", ", 1)[0] for k in ran(memory)}
    more = {k.rsplit(", ", 1)[0] for k in ran(folder)} - short
    needs = sorted({k.rsplit(", ", 1)[0] for k in failed(folder)})
    return (
        cell(
            f"start with any model: {names(sorted(short))}; in the first row all but DuoAttention,"
            " whose pattern is set by hand there",
            f"start with a model in a folder: {names(sorted(more))}",
            f"need the network or a published checkpoint: {names(needs)}",
        ),
        cell(f"{len(ran(own))} of {len(own)} plans start; nothing is downloaded"),
    )


def families(kv: Record, own: Record) -> tuple[str, str]:
    def count(records: Record) -> str:
        good = [v for v in ran(records).values() if v["gap"] < RIGHT]
        wrong = len(ran(records)) - len(good)
        return (
            f"{len(good)} of {len(records)} exact, {wrong} wrong,"
            f" {len(failed(records))} stop with an error"
        )

    named = {k: v for k, v in kv.items() if k.split(", ")[0] in NAMED}
    others = {k: v for k, v in kv.items() if k not in named}
    missed = {k: v for k, v in ran(kv).items() if v.get("agreement", 1.0) <= ALL}
    return (
        cell(
            f"families that it names: {count(named)}",
            f"others: {count(others)}",
            [f"{k}: {v['agreement']:.0%} of the kept tokens are right" for k, v in missed.items()],
        ),
        cell(
            count(own),
            f"{sum(v.get('agreement', 0) > ALL for v in own.values())} of"
            f" {sum('agreement' in v for v in own.values())} keep the right tokens and no other",
            errors(own),
        ),
    )


# situation → title, how it is measured, and what its two cells say
ROWS = {
    "storage": (
        "Bytes really freed",
        "sum over the distinct tensor storages of the cache after the prompt, and error of the"
        " next steps against the reference",
        storage,
    ),
    "per_layer": (
        "Different budgets per layer",
        "single steps, then a question of {question_tokens} tokens at once, and `generate`",
        per_layer,
    ),
    "padding": (
        "Left-padded batch",
        "rows of {context_tokens} and {short_row_tokens} tokens; logits of each row against the"
        " same row alone under the same method",
        padding,
    ),
    "chunked": (
        "Prompt in four chunks",
        "tokens held at the end; logits against one-shot prefill",
        chunked,
    ),
    "second_turn": (
        "Second turn",
        "1 to 128 tokens at once after a compressed prompt, then single steps, on random weights"
        " and on the shipped trained model",
        second_turn,
    ),
    "long_generation": ("Long generation", "tokens held over 256 single steps", long_generation),
    "interleaved": (
        "Two requests on one model",
        "logits of a request with another prompt compressed in between, against without",
        interleaved,
    ),
    "intact": ("Stored cache after one step", "stored keys before and after, by token", intact),
    "reuse": ("Two answers from one prompt", "the second continuation against the first", reuse),
    "save_load": (
        "Saving a compressed cache",
        "logits after loading into a model built anew, against going on without saving",
        save_load,
    ),
    "quantized_cache": (
        "Quantized cache",
        "see the table; kept set against that of exact keys",
        quantized_cache,
    ),
    "quantized_weights": (
        "Weights in nf4 and int8",
        "bitsandbytes; error against the reference",
        quantized_weights,
    ),
    "eager": ("Eager attention", "error against the reference", eager),
    "families": (
        "Model families",
        "see the table; kept set against the model's own attention",
        families,
    ),
    "positions": (
        "The next token by hand",
        "error against the reference, and the position that the rotary embedding was given"
        " ({context_tokens} is right)",
        positions,
    ),
    "offline": ("Starting offline", "which methods start without network", offline),
}
