"""What an evaluation measures by forwards of its own is what `model.generate` gives a user."""

import pytest
import torch

from kvcompress.evaluate.serving import cache_bytes, serving
from kvcompress.evaluate.session import Dialogue, Session, converse
from kvcompress.plan import Budget, HeadPlan, PooledBudget, uniform
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument, cache_of

QUARTER = HeadPlan(frequent=Budget(ratio=0.25), local=Budget(tokens=8))
CLASSES = HeadPlan(special=True, punct=True, frequent=Budget(tokens=6), k_dtype="int8")
WINDOW = HeadPlan(local=Budget(tokens=12), k_dtype="int4", v_dtype="int4")
PLANS = {
    "the full cache": None,
    "ranked": {"head": QUARTER},
    "classes": {"head": CLASSES, "special_ids": (0, 1), "punct_ids": tuple(range(40, 60))},
    "relative positions": {"head": WINDOW, "positions": "relative"},
    "decided per prompt": {"head": QUARTER, "per_request": PooledBudget(kind="pooled")},
    "a prompt read twice": {"head": QUARTER, "scorer": "kvzip", "repeat_ids": (70, 71)},
}
NEW = 10


@pytest.mark.parametrize("kind", PLANS)
def test_the_same_tokens_and_bytes_as_generate(tiny_llama, kind):
    settings = dict(PLANS[kind] or {})
    shape = shape_of(tiny_llama.config)
    plan = uniform(shape, settings.pop("head"), **settings) if settings else None
    rows = torch.randint(3, 250, (2, 60), generator=torch.Generator().manual_seed(3))
    with serving(tiny_llama, plan, None) as new_cache:
        session = Session(tiny_llama, new_cache(), pad_id=2)
        dialogues = [Dialogue([([], NEW)]) for _ in rows]
        logits = session.prefill(rows.tolist())
        prompt_bytes = cache_bytes(session.cache)
        converse(session, logits, dialogues, lambda token: False)
        made = tiny_llama.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            **as_argument(new_cache()),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
        )
        short = tiny_llama.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            **as_argument(new_cache()),
            max_new_tokens=1,
            return_dict_in_generate=True,
        )
    answers = [dialogue.answers[0] for dialogue in dialogues]
    assert made.sequences[:, 60:].tolist() == answers
    assert cache_bytes(cache_of(short)) == prompt_bytes
