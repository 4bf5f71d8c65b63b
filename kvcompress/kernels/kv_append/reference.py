"""The token that leaves the exact slots takes a victim's slot of codes, or is dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.keepset import class_score
from kvcompress.kernels.compact_quantize.reference import store
from kvcompress.kernels.score_select.reference import ranks, vote_weight
from kvcompress.kernels.view import (
    ExactView,
    GroupView,
    HeadsView,
    PiecesView,
    RowsView,
    RuleView,
    StepView,
    TokenView,
)


def kv_append(
    token: TokenView,
    exact: ExactView,
    heads: HeadsView,
    group: GroupView,
    pieces: PiecesView,
    rows: RowsView,
    rule: RuleView,
    step: StepView,
    initial: Tensor | None,
) -> None:
    """Take the token in, in the heads of one group.

    Recent scores get the token's votes; the token that leaves is ranked against the weakest stored
    one and encoded over it where it is not weaker; the token's vectors take the exact slot.

    Args:
        exact, group: changed in place. `row_advance` has entered the token's position already.
        step: `weakest` is of this group, the rest of the layer.
        initial: ``[B, Ms]`` score of the token before anyone has voted, None is 0.
    """
    (_, lse, exact_logits), (notes, granted), weakest = step
    weight = vote_weight(rows, rule.vote, lse.shape[-1])
    for row, (exact_slot, left, flags) in enumerate(notes.tolist()):
        real = rows.valid is None or bool(rows.valid[row])
        recent = exact_slot - exact.sinks
        for member in range(pieces.base.shape[1]):
            head, at = pieces.first_head + member, (row, member)
            bits = int(rule.bits[head])
            own_score = torch.zeros(1)
            if group.recent_score is not None and bits & 16:
                share = torch.exp(exact_logits[row, head] - lse[row, head, :, None]) * weight[row]
                share = share.nan_to_num(0.0).sum(0)
                group.recent_score[at] += share[exact.sinks : -1]
                own_score = group.recent_score[at][max(0, recent)][None]
                own_score = class_score(rule.bits[head] & 3, torch.tensor([flags]), own_score)
                arriving = share[-1] + (0.0 if initial is None else initial[at])
                if real and recent >= 0:
                    group.recent_score[at][recent] = arriving
            in_class = torch.tensor([bool(flags & bits & 3)])
            own = ranks(rule, rows, (row, head), torch.tensor([left]), own_score, in_class)[0]
            first, count = heads.chunks[row, head].tolist()
            part = slice(first - pieces.first_work, first - pieces.first_work + count)
            if count and int(granted[row, head]) and own > -torch.inf:
                best = weakest.rank[part].argmin()
                if weakest.rank[part][best] <= own:
                    to = weakest.slot[part][best][None]
                    group.position[to] = left
                    if group.score is not None and bits & 16:
                        group.score[to] = own_score
                    key, value = (t[row, head, exact_slot][None] for t in (exact.k, exact.v))
                    constants = (t[head] for t in heads.constants)
                    store(group.k, group.v, to, key, value, *constants)
            if real:
                model_head = int(heads.number[head])
                exact.k[row, head, exact_slot] = token.key[row, model_head, 0]
                exact.v[row, head, exact_slot] = token.value[row, model_head, 0]
