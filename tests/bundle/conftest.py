"""A tiny model, a profile of it and a bundle in each weight format, made once."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress.bundle.write import ExportReport, export
from kvcompress.plan import Budget, HeadPlan, Plan
from kvcompress.profile.source import load_model, weight_bytes, weights_hash
from kvcompress.profile.store import LayerWeights, Profile, Provenance
from kvcompress.profile.weights import layer_modules, weight_sizes
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import PARTS, Recipe, WeightScheme
from kvcompress.runtime.model.families import shape_of
from kvcompress.tokenizer import tokenizer_hash
from tests.bundle.helpers import Exported, Mixed, checked_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32


@pytest.fixture(scope="session")
def model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random Llama in bf16 with a tokenizer, a licence and a model card. Read only."""
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=128,
        intermediate_size=176,  # not a multiple of 64: the whole MLP cannot be nf4
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you please.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="session")
def plan(model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Plan:
    """Two kinds of heads, so that something is evicted and something is not."""
    from transformers import AutoConfig

    sparse = HeadPlan(special=True, frequent=Budget(ratio=0.25), k_dtype="int8", v_dtype="int4")
    full = HeadPlan(full=True)
    return Plan(
        model=shape_of(AutoConfig.from_pretrained(model_dir), torch.bfloat16),
        heads=((sparse, full), (full, sparse)),
        special_ids=(0, 1, 2),
        tokenizer_hash=tokenizer_hash(tiny_tokenizer),
        max_position=512,
    )


@pytest.fixture(scope="session")
def profile_dir(tmp_path_factory: pytest.TempPathFactory, plan: Plan, model_dir: Path) -> Path:
    """A profile directory. Read only."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "plan.json").write_text(plan.to_json())
    every = (((0.5,),) * KV_HEADS,) * LAYERS
    Profile(
        parts=PARTS,
        model=str(model_dir),
        shape=plan.model,
        recipe=Recipe(),
        provenance=Provenance(
            data="builtin",
            data_hash="0" * 64,
            weights_hash=weights_hash(LlamaForCausalLM.from_pretrained(model_dir, dtype="auto")),
            prompts=1,
            prompt_tokens=64,
            held_out_rows=8,
            device="cpu",
            dtype="bfloat16",
            versions={},
        ),
        tokenizer_hash=str(plan.tokenizer_hash),
        weight_bytes={},
        special_ids=plan.special_ids,
        punct_ids=(),
        special_share=0.0,
        punct_share=0.0,
        rotations=("none",) * LAYERS,
        chain=(HeadPlan(full=True),),
        recovery=every,
        recovery_l1=every,
        candidates=(HeadPlan(full=True),),
        losses=every,
    ).save(folder)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(LAYERS, KV_HEADS, HEAD_DIM, generator=generator)
    KVParams(tuple(centers), tuple(torch.ones_like(centers))).save(folder / "kv_params.safetensors")
    return folder


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, profile_dir: Path
) -> Exported:
    """The bundle in a weight format and the report of its export. Read only."""

    @cache
    def get(weights: WeightScheme) -> tuple[Path, ExportReport]:
        out = tmp_path_factory.mktemp("bundles") / weights
        with checked_here():
            return out, export(model_dir, profile_dir, out, weights=weights)

    return get


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, profile_dir: Path, model_dir: Path) -> Path:
    """The profile with what it would say of weights. Read only."""
    folder = tmp_path_factory.mktemp("measured") / "profile"
    shutil.copytree(profile_dir, folder)
    profile, model = Profile.load(folder), load_model(str(model_dir), "cpu")
    layers = tuple(
        LayerWeights(
            modules=tuple(modules),
            size_bytes=weight_sizes(modules),
            nats={"bf16": 0.0, "int8": 0.1, "nf4": 0.2},
        )
        for modules in layer_modules(model, profile.shape.layers)
    )
    more = {"weight_layers": layers, "weight_bytes": weight_bytes(model)}
    profile.model_copy(update=more).save(folder)
    return folder


@pytest.fixture(scope="session")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, measured: Path, plan: Plan
) -> Mixed:
    """The bundle whose layers have these formats and the report of its export. Read only."""

    @cache
    def get(weights: tuple[WeightScheme, ...]) -> tuple[Path, ExportReport]:
        out = tmp_path_factory.mktemp("mixed") / "bundle"
        with checked_here():
            formats = plan.model_copy(update={"weights": weights})
            return out, export(model_dir, measured, out, plan=formats)

    return get


@pytest.fixture
def bundle(tmp_path: Path, exported: Exported) -> Path:
    """A bf16 bundle to damage."""
    return Path(shutil.copytree(exported("bf16")[0], tmp_path / "bundle"))
