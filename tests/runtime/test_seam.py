"""The seam to transformers: every way of calling a model with a plan is announced to the cache and
uses it, or is refused with the reason."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

import kvcompress
from kvcompress.errors import KVCompressError, UnsupportedModelError, UntestedReleaseWarning
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime import names
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf import announce, generate
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import CACHE, CACHE_NAMES, as_argument, cache_of
from tests.runtime.models import VOCAB, build, prompts

FULL = HeadPlan(full=True, k_dtype="model", v_dtype="model")
EVICTING = HeadPlan(
    frequent=Budget(tokens=6), local=Budget(tokens=8), k_dtype="int8", v_dtype="int8"
)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def served(head=EVICTING, **more):
    model = build("llama")
    return attach(
        model, uniform(shape_of(model.config), head, sink_tokens=2, recent_tokens=4, **more)
    )


@pytest.fixture
def inputs():
    return prompts(2, 40, [3, 0])


@pytest.fixture
def announced(monkeypatch):
    """Lengths of the forwards that any cache was told of."""
    lengths = []
    real = CompressedCache.note_forward

    def note(self, ids, length, *args, **kwargs):
        lengths.append(length)
        return real(self, ids, length, *args, **kwargs)

    monkeypatch.setattr(CompressedCache, "note_forward", note)
    return lengths


def decoded(model, cache, inputs, call):
    """Logits of a prompt and three tokens, by forwards made by `call`."""
    mask = inputs["attention_mask"]
    rows = []
    with torch.no_grad():
        rows.append(call(inputs["input_ids"], mask, cache)[:, -1])
        for token in (5, 9, 11):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            rows.append(call(torch.full((2, 1), token), mask, cache)[:, -1])
    return torch.stack(rows)


# ---- every way to pass the cache
WAYS = {
    **{
        f"by the name {name}": lambda m, name=name: (
            lambda i, a, c: m(input_ids=i, attention_mask=a, **{name: c}).logits
        )
        for name in CACHE_NAMES
    },
    "by place": lambda m: lambda i, a, c: m(i, a, None, c).logits,
    "ids by place": lambda m: lambda i, a, c: m(i, attention_mask=a, **as_argument(c)).logits,
    "embeddings": lambda m: (
        lambda i, a, c: (
            m(inputs_embeds=m.get_input_embeddings()(i), attention_mask=a, **as_argument(c)).logits
        )
    ),
    "a tuple as output": lambda m: (
        lambda i, a, c: m(i, attention_mask=a, return_dict=False, **as_argument(c))[0]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_is_announced_however_the_cache_is_passed(way, inputs, announced):
    plain = build("llama")
    reference = DynamicCache(config=plain.config)
    expected = decoded(plain, reference, inputs, WAYS["ids by place"](plain))
    model = served(FULL)
    found = decoded(model, new_cache(model), inputs, WAYS[way](model))
    assert announced == [40, 1, 1, 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # float32 sums in other order


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_takes_both_names_without_a_warning(name, inputs, announced):
    model = served()
    expected = model.generate(**inputs, **GREEDY)
    cache = new_cache(model)
    announced.clear()
    assert torch.equal(model.generate(**inputs, **GREEDY, **{name: cache}), expected)
    assert announced == [40, 1, 1, 1, 1, 1] and cache.get_seq_length() == 45


def test_two_caches_and_two_values_of_an_argument_are_refused(inputs):
    model, ids = served(), inputs["input_ids"]
    two = {name: new_cache(model) for name in CACHE_NAMES}
    with pytest.raises(KVCompressError, match="two caches, as cache and past_key_values"):
        model(ids, **two)
    with pytest.raises(KVCompressError, match="two caches"):
        model.generate(**inputs, **two)
    with pytest.raises(TypeError, match="input_ids is given by place and by name"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="20 arguments by place"):
        model(*[None] * 20)


def test_a_forward_that_gives_no_cache_gets_a_compressed_one(inputs):
    """Where transformers would make its own: else the next forward would run uncompressed."""
    model = served()
    with torch.no_grad():
        out = model(**inputs)
        mine = new_cache(model)
        expected = model(**inputs, **as_argument(mine)).logits
        assert type(cache_of(out)) is CompressedCache
        assert cache_of(out).nbytes() == mine.nbytes()
        assert torch.equal(out.logits, expected)
        assert cache_of(model(**inputs, use_cache=False)) is None
        model.config.use_cache = False
        assert cache_of(model(**inputs)) is None
    model.train()
    assert cache_of(model(**inputs, use_cache=False)) is None  # gradients need the plain way
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# ---- the handshake
def test_a_forward_of_which_the_cache_was_not_told_raises(inputs, monkeypatch):
    release = f"transformers {transformers.__version__}"
    text = rf"layer 0: a forward of 40 tokens was not announced to its cache \({re.escape(release)}"
    ids = inputs["input_ids"]
    model = served()
    with torch.no_grad(), pytest.raises(KVCompressError, match=text):
        model.model(ids, **as_argument(new_cache(model)))  # a part of the model: no hook there
    plain = build("llama")
    with torch.no_grad(), pytest.raises(KVCompressError, match=text):
        plain(ids, **as_argument(new_cache(model)))
    # a release in which the argument has a third name
    monkeypatch.setattr(announce, "CACHE", "kv_state")
    with torch.no_grad(), pytest.raises(KVCompressError, match=text):
        model(ids, **as_argument(new_cache(model)))
    monkeypatch.undo()
    # every layer spends its announcement
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, **as_argument(cache))
        cache.note_forward(ids[:, :1], 1)
        with pytest.raises(KVCompressError, match="1 tokens was not announced"):
            model.model(ids[:, :1], **as_argument(cache))
            model.model(ids[:, :1], **as_argument(cache))
        cache.note_forward(ids[:, :3], 3)
        with pytest.raises(KVCompressError, match="2 tokens was announced with 3"):
            model.model(ids[:, :2], **as_argument(cache))


@pytest.mark.parametrize("static", [False, True])
def test_a_decode_step_of_which_the_cache_was_not_told_raises(static, inputs):
    model, ids = served(), inputs["input_ids"]
    plan = model.__dict__["_kvcompress_attached"].plan
    cache = new_cache(model)
    if static:
        cache = kvcompress.StaticCompressedCache(plan, None, batch=2, max_tokens=60)
    with torch.no_grad():
        model(**inputs, **as_argument(cache))
        with pytest.raises(KVCompressError, match="layer 0: a forward of 1 tokens was not anno"):
            model.model(ids[:, :1], **as_argument(cache))


@pytest.mark.parametrize("name", ["_prepare_cache_for_generation", "_prefill"])
def test_a_generate_that_does_not_ask_us_is_noticed(name, inputs):
    """As a release would do that calls the method by another name."""
    model = served()
    del model.__dict__[name]
    text = rf"generate of transformers {transformers.__version__} fed Llama.*calling its {name}"
    with pytest.raises(KVCompressError, match=text):
        model.generate(**inputs, **GREEDY)


def test_drafts_that_do_not_ask_us_are_noticed():
    model = served()
    del model.__dict__["_get_candidate_generator"]
    with pytest.raises(KVCompressError, match="without calling its _prefill"):
        model.generate(**prompts(1, 40), prompt_lookup_num_tokens=3, **GREEDY)


@pytest.mark.parametrize("name", generate._OVERRIDES)
def test_a_release_without_a_method_that_we_need_is_refused(name, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(generate, "_OVERRIDES", {**generate._OVERRIDES, f"{name}_new": None})
    with pytest.raises(UnsupportedModelError, match=f"has no {name}_new, through which"):
        attach(model, uniform(shape_of(model.config), FULL))
    assert "generate" not in model.__dict__ and not model._forward_pre_hooks


# ---- what a checkpoint and a caller say of caches
SAYS = {
    "use_cache": [False],
    "cache_implementation": ["static", "offloaded", "offloaded_static", "dynamic", "hybrid"],
}
SAID = [(name, value) for name, values in SAYS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), SAID)
@pytest.mark.parametrize("given", [False, True])
def test_a_checkpoint_does_not_switch_the_compressed_cache_off(name, value, given, inputs):
    model = served()
    expected = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    held = cache_of(expected).nbytes()
    setattr(model.generation_config, name, value)
    if name == "use_cache":
        model.config.use_cache = value
    more = as_argument(new_cache(model)) if given else {}
    found = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **more)
    assert torch.equal(found.sequences, expected.sequences)
    assert type(cache_of(found)) is CompressedCache and cache_of(found).nbytes() == held
    assert cache_of(found).get_seq_length() == 45  # each token once
    assert getattr(model.generation_config, name) == value


@pytest.mark.parametrize(("name", "value"), [*SAID, ("cache_implementation", "paged")])
@pytest.mark.parametrize("config", [False, True])
def test_a_caller_who_asks_for_another_cache_is_told(name, value, config, inputs):
    model = served()
    asked = {name: value, **GREEDY}
    if config:
        asked = {"generation_config": GenerationConfig(**asked)}
    for more in ({}, as_argument(new_cache(model))):
        with pytest.raises(KVCompressError, match=rf"generate\({name}={value!r}\) would go past"):
            model.generate(**inputs, **asked, **more)
    detach(model)
    if value in (False, "static", "dynamic"):
        model.generate(**inputs, **asked)  # transformers' own again


def test_a_configuration_of_the_caller_says_nothing_of_caches(inputs):
    model = served()
    expected = model.generate(**inputs, **GREEDY)
    model.generation_config.use_cache = False
    config = GenerationConfig(**GREEDY)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    copied = copy.deepcopy(model.generation_config)
    copied.max_new_tokens, copied.do_sample = 6, False
    assert torch.equal(model.generate(**inputs, generation_config=copied), expected)


def test_a_cache_of_another_kind_that_the_caller_passes_is_used(inputs):
    model = served()
    theirs = DynamicCache(config=model.config)
    found = model.generate(**inputs, **GREEDY, **as_argument(theirs))
    assert torch.equal(found, build("llama").generate(**inputs, **GREEDY))
    assert theirs.get_seq_length() == 45


@pytest.mark.parametrize(
    "asked", [{"custom_generate": "someone/loop"}, {"trust_remote_code": True}]
)
def test_generate_runs_no_remote_code(asked, inputs):
    with pytest.raises(KVCompressError, match="remote code is never run"):
        served().generate(**inputs, **asked)


def test_a_loop_of_the_callers_own_may_decode(inputs, announced):
    def loop(model, input_ids, **kwargs):
        kwargs = {name: kwargs[name] for name in ("attention_mask", CACHE)}
        return model(input_ids, **kwargs).logits[:, -1].argmax(-1)

    model = served()
    first = model.generate(**inputs, **GREEDY)[:, 40]
    announced.clear()
    assert torch.equal(model.generate(**inputs, custom_generate=loop, **GREEDY), first)
    assert announced == [40]


# ---- wrapped, copied, moved
def test_torch_compile_changes_nothing(inputs):
    torch._dynamo.reset()
    model = served()
    compiled = torch.compile(model, backend="eager")
    call = WAYS["ids by place"]
    expected = decoded(model, new_cache(model), inputs, call(model))
    found = decoded(compiled, new_cache(compiled), inputs, call(compiled))
    assert torch.equal(found, expected)
    assert torch.equal(compiled.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    detach(compiled)
    assert "generate" not in model.__dict__


# peft itself asks transformers for an attribute by its old name
quiet_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    model = build("llama")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).eval()


@quiet_peft
def test_a_model_wrapped_by_peft(lora, inputs, announced):
    plain = build("llama").generate(**inputs, **GREEDY)
    expected = lora.generate(**inputs, **GREEDY)
    assert not torch.equal(plain, expected)  # the adapter does something
    assert attach(lora, uniform(shape_of(lora.config), FULL)) is lora
    assert torch.equal(lora.generate(**inputs, **GREEDY), expected)
    assert announced == [40, 1, 1, 1, 1, 1]
    with lora.disable_adapter():
        assert torch.equal(lora.generate(**inputs, **GREEDY), plain)
    with torch.no_grad():
        out = lora(**inputs, **as_argument(new_cache(lora)))
    assert type(cache_of(out)) is CompressedCache
    detach(lora)
    assert torch.equal(lora.generate(**inputs, **GREEDY), expected)


@quiet_peft
def test_peft_methods_that_put_their_own_keys_into_the_cache_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(UnsupportedModelError, match="PrefixTuningConfig puts keys and values of"):
        attach(model, uniform(shape_of(model.config), FULL))
    with pytest.raises(UnsupportedModelError, match="a Linear is no transformers model"):
        attach(torch.nn.Linear(2, 2), None)


def test_a_pipeline_uses_the_cache(demo_model_dir, announced):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir, padding_side="left")
    attach(model, uniform(shape_of(model.config), FULL))
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "Note: amber river copper lemon.\nAsk: amber river"
    found = ask(text, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert found.startswith(text + " copper lemon") and announced[1:] == [1, 1, 1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("compress", ["per_chunk", "after_prefill"])
def test_a_copied_cache_goes_on_alone(mode, copied, compress, inputs):
    model = served()
    token = {"input_ids": torch.full((2, 1), 9)}
    with mode():
        cache = new_cache(model, compress=compress)
        model(**inputs, **as_argument(cache))
        if compress == "per_chunk":
            model(**token, **as_argument(cache))  # a decoded token: the kernels hold a view
        again = copy.deepcopy(cache) if copied == "deepcopy" else pickle.loads(pickle.dumps(cache))
        first = model(**token, **as_argument(cache)).logits
    with torch.no_grad():  # in another mode than the one it was copied in
        assert torch.equal(model(**token, **as_argument(again)).logits, first)
    assert again.nbytes() == cache.nbytes()


SAVED = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
from kvcompress.runtime.cache.cache import CompressedCache
out = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
assert torch.equal(out.sequences, expected)
assert any(type(value) is CompressedCache for value in out.values())
"""


def test_a_pickled_model_works_here_and_in_a_fresh_process(inputs, tmp_path):
    model = served()
    expected = model.generate(**inputs, **GREEDY)
    path = tmp_path / "model.pt"
    torch.save((model, inputs, expected), path)
    again = torch.load(io.BytesIO(path.read_bytes()), weights_only=False)[0]
    assert torch.equal(again.generate(**inputs, **GREEDY), expected)
    detach(again)
    plain = build("llama").generate(**inputs, **GREEDY)
    assert torch.equal(again.generate(**inputs, **GREEDY), plain)
    subprocess.run([sys.executable, "-c", SAVED, str(path)], check=True, timeout=300)


def test_a_copied_model_is_its_own(inputs):
    model = served()
    expected = model.generate(**inputs, **GREEDY)
    other = copy.deepcopy(model)
    assert torch.equal(other.generate(**inputs, **GREEDY), expected)
    detach(model)
    assert torch.equal(other.generate(**inputs, **GREEDY), expected)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert not torch.equal(other.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_another_dtype_after_attach(dtype, inputs):
    model = served()
    old = new_cache(model)
    with torch.no_grad():
        model(**inputs, **as_argument(old))
        model.to(dtype)
        before = attach(
            build("llama", dtype=dtype), model.__dict__["_kvcompress_attached"].plan
        ).generate(**inputs, **GREEDY)
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(out.sequences, before)
        assert cache_of(out).layers[0].state.exact_k.dtype == dtype
        text = f"holds tokens of dtype torch.float32, this forward has dtype {dtype}"
        with pytest.raises(KVCompressError, match=text):
            model(input_ids=torch.full((2, 1), 9), **as_argument(old))


def test_a_batch_that_changes_size_is_refused(inputs):
    model, ids = served(), inputs["input_ids"]
    for rows in (1, 3):
        cache = new_cache(model)
        with torch.no_grad():
            model(**inputs, **as_argument(cache))
            held = cache.nbytes()
            for more in ({"input_ids": ids[:1].repeat(rows, 1)[:, :1]},
                         {"inputs_embeds": torch.zeros(rows, 1, 64)}):  # fmt: skip
                text = f"holds tokens of rows 2, this forward has rows {rows}: pass the same batch"
                with pytest.raises(KVCompressError, match=text):
                    model(**more, **as_argument(cache))
        assert cache.nbytes() == held


@pytest.mark.parametrize(("seen", "length"), [(0, 1), (0, 5), (40, 5)])
@pytest.mark.parametrize("token", [-100, -1, VOCAB, 10**9])
def test_a_token_that_the_model_does_not_embed_is_refused(inputs, token, seen, length):
    model = served()
    cache = new_cache(model)
    ids = torch.full((2, length), 5)
    ids[1, -1] = token
    with torch.no_grad():
        if seen:
            model(**inputs, **as_argument(cache))
        held = cache.nbytes()
        with pytest.raises(KVCompressError, match=f"token {token} is none of the {VOCAB}"):
            model(input_ids=ids, **as_argument(cache))
        assert (cache.nbytes(), cache.get_seq_length()) == (held, seen)
        model(input_ids=ids.clamp(0, 5), **as_argument(cache))  # and goes on


# ---- a prompt on a cache that holds something
def test_a_prompt_that_is_neither_the_whole_text_nor_new_tokens_is_refused(inputs):
    model = served()
    ids = prompts(1, 60)["input_ids"]

    def held():
        cache = new_cache(model)
        with torch.no_grad():
            model(ids[:, :20], **as_argument(cache))
        return cache

    whole = model.generate(ids, **GREEDY, **as_argument(held()))
    for length in (10, 40):  # of new tokens, fewer and more than the cache holds
        new = ids[:, 20 : 20 + length]
        mask = torch.ones(1, 20 + length, dtype=torch.long)
        out = model.generate(new, attention_mask=mask, **GREEDY, **as_argument(held()))
        expected = model.generate(ids[:, : 20 + length], **GREEDY, **as_argument(held()))
        assert torch.equal(out[:, length:], expected[:, 20 + length :])
    assert whole.shape == (1, 66)
    for more in ({}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(KVCompressError, match="row 0: the first 20 ids are not the tokens"):
            model.generate(ids.flip(1), **GREEDY, **more, **as_argument(held()))
        with pytest.raises(KVCompressError, match="10 tokens with a mask of 10, and the cache ha"):
            model.generate(ids[:, :10], **GREEDY, **more, **as_argument(held()))
        mask = torch.ones(1, 25, dtype=torch.long)
        with pytest.raises(KVCompressError, match="10 tokens with a mask of 25, and the cache ha"):
            model.generate(
                ids[:, 20:30], attention_mask=mask, **GREEDY, **more, **as_argument(held())
            )


# ---- releases
def test_the_range_of_releases_is_the_one_of_pyproject():
    text = (Path(kvcompress.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    needs = tomllib.loads(text)["project"]["dependencies"]
    oldest, newest = names.OLDEST_TESTED, names.NEWEST_TESTED
    below = f"{newest[0]}.{newest[1] + 1}"
    assert f"transformers>={oldest[0]}.{oldest[1]},<{below}" in needs


@pytest.mark.parametrize("version", ["5.17.0", "5.20.2", "5.24.0", "5.24.9"])
def test_a_tested_release_says_nothing(version, monkeypatch):
    monkeypatch.setattr(names.transformers, "__version__", version)
    names.check_release()


def test_an_untested_release_is_named_once(monkeypatch):
    model = build("llama")
    plan = uniform(shape_of(model.config), FULL)
    monkeypatch.setattr(names.transformers, "__version__", "5.99.1.dev0")
    names._warn_of_untested.cache_clear()
    with pytest.warns(UntestedReleaseWarning, match=r"transformers 5\.99\.1\.dev0 is newer than"):
        attach(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, plan)
    monkeypatch.setattr(names.transformers, "__version__", "5.16.3")
    with pytest.raises(KVCompressError, match=r"transformers 5\.16\.3 is too old"):
        attach(model, plan)
