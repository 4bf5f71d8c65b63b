"""Settings of a model directory that would run code, fetch kernels or build without end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint import settings
from kvcompress.checkpoint.load import find, load_config, load_model, load_tokenizer
from kvcompress.errors import UnsupportedModelError

CODE = "import os\nopen(os.environ['MARK'], 'w').write('ran')\n"


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


@pytest.fixture
def model_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A model directory to change."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


# ------------------------------------------------------------------- code of the model's own
def config_code(model: Path) -> None:
    """An architecture that only the directory's code has."""
    (model / "code.py").write_text(CODE + "from transformers import LlamaConfig as Own\n")
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "code.Own"})


def known_config_code(model: Path) -> None:
    (model / "code.py").write_text(CODE + "from transformers import LlamaConfig as Own\n")
    edit(model / "config.json", auto_map={"AutoConfig": "code.Own"})


def model_code(model: Path) -> None:
    (model / "code.py").write_text(CODE + "from transformers import LlamaForCausalLM as Own\n")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "code.Own"})


def tokenizer_code(model: Path) -> None:
    (model / "code.py").write_text(CODE + "from transformers import LlamaTokenizer as Own\n")
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["code.Own", None]},
        tokenizer_class="Own",
    )


def generate_code(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE + "def generate(*a, **k): ...\n")


def attention_code(model: Path) -> None:
    edit(model / "config.json", attn_implementation="someone/attention")


CODES = [
    config_code,
    known_config_code,
    model_code,
    tokenizer_code,
    generate_code,
    attention_code,
]
COMMANDS = {
    "probe": ["probe", "MODEL"],
    "probe, made-up weights": ["probe", "MODEL", "--random-weights"],
    "profile": ["profile", "MODEL", "-o", "OUT"],
    "eval": ["eval", "MODEL", "-c", "OUT"],
    "bench": ["bench", "MODEL"],
}
# Each kind of code is offered to each command in one process: it answers yes to every question.
YES = """
import json, sys, threading, warnings
import kvcompress.kernels  # the package itself is not under suspicion
def never(*a, **k):
    raise SystemExit("a kernel was asked for")
import transformers.integrations.hub_kernels as hub
hub.get_kernel = hub.load_and_register_attn_kernel = never
from kvcompress.bundle.source import find
from kvcompress.cli.app import main
from kvcompress.errors import KVCompressError
for arguments in json.load(open(sys.argv[1])):
    try:
        find(arguments[1]) if arguments[0] == "find" else main(arguments)
    except (SystemExit, KVCompressError) as stop:
        print("ended", stop)
"""


def test_no_command_runs_code_of_a_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    calls = []
    for code in CODES:
        model = Path(shutil.copytree(tiny_model_dir, tmp_path / code.__name__))
        code(model)
        calls.append(["find", str(model)])
        for command, words in COMMANDS.items():
            if code not in REFUSED and command not in ("profile", "eval"):
                continue  # a model that is served is measured for a minute
            given = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
            calls.append([given.get(word, word) for word in words])
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    mark = tmp_path / "mark"
    done = subprocess.run(
        [sys.executable, "-c", YES, str(tmp_path / "calls.json")],
        input="y\n" * 200,
        capture_output=True,
        text=True,
        env={**os.environ, "MARK": str(mark), "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists(), mark.read_text()
    assert "custom code" not in done.stdout and "[y/N]" not in done.stdout + done.stderr
    assert "a kernel was asked for" not in done.stdout + done.stderr


REFUSED: dict[Callable[[Path], None], str] = {
    config_code: r"config\.json: 'own' is not an architecture of transformers but code of the",
    generate_code: r"brings code of its own \(custom_generate\), which is never run",
    tokenizer_code: r"its tokenizer is code of the model's own, which is never run",
    attention_code: r"attn_implementation asks for 'someone/attention', and kernels are not fetch",
}


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_code_is_refused_or_left_alone(code: Callable[[Path], None], model_dir: Path) -> None:
    """Leftovers of a model that transformers has itself are not followed."""
    code(model_dir)
    if code in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[code]):
            load_tokenizer(find(model_dir))
        return
    found = find(model_dir)
    assert type(load_config(found)).__module__.startswith("transformers.")
    assert type(load_tokenizer(found)).__module__.startswith("transformers.")
    model = load_model(found, load_config(found))
    assert type(model).__module__.startswith("transformers.")


# ------------------------------------------------------------------------------- other settings
IMPLEMENTATION = "asks for 'someone/kernel', and kernels are not fetched"
SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (what config.json says, the check that refuses it, what it says)
    "attention": ({"attn_implementation": "someone/kernel"}, "implementations", IMPLEMENTATION),
    "with revision": ({"attn_implementation": "a/b@c:d"}, "implementations", "asks for 'a/b@c:d'"),
    "paged": ({"_attn_implementation": "paged|a/b"}, "implementations", "asks for 'paged|a/b'"),
    "flash": (
        {"attn_implementation": "flash_attention_2"},
        "implementations",
        "asks for 'flash_attention_2', .* write one of eager, sdpa",
    ),
    "private": ({"_attn_implementation": "someone/kernel"}, "implementations", IMPLEMENTATION),
    "internal": (
        {"_attn_implementation_internal": "someone/kernel"},
        "implementations",
        IMPLEMENTATION,
    ),
    "by part": (
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        "implementations",
        IMPLEMENTATION,
    ),
    "nested": (
        {"text_config": {"attn_implementation": "someone/kernel"}},
        "implementations",
        IMPLEMENTATION,
    ),
    "nested list": (
        {"layers": [{"_attn_implementation_internal": "someone/kernel"}]},
        "implementations",
        IMPLEMENTATION,
    ),
    "experts": (
        {"experts_implementation": "someone/kernel"},
        "implementations",
        IMPLEMENTATION,
    ),
    "experts by kernel": (
        {"_experts_implementation": "deepgemm"},
        "implementations",
        "asks for 'deepgemm', .* batched_mm, eager, grouped_mm",
    ),
    "kernels": ({"use_kernels": True}, "foreign keys", "its use_kernels would change what is"),
    "fusion": ({"fusion_config": {"a": 1}}, "foreign keys", "its fusion_config would change"),
    "other weights": (
        {"transformers_weights": "../other.safetensors"},
        "foreign keys",
        "its transformers_weights would change what is loaded, or from where",
    ),
    "layers": ({"num_hidden_layers": 10**6}, "bounds", "num_hidden_layers is 1000000, expected"),
    "layers as text": ({"num_hidden_layers": "3"}, "bounds", "num_hidden_layers is 3, expected"),
    "layers by truth": ({"num_hidden_layers": True}, "bounds", "num_hidden_layers is True"),
    "below zero": ({"hidden_size": -64}, "bounds", "hidden_size is -64, expected a number up to"),
    "vocabulary": ({"vocab_size": 2**31}, "bounds", "vocab_size is 2147483648, expected"),
    "nested size": ({"text_config": {"hidden_size": 2**30}}, "bounds", "hidden_size is 1073741824"),
    "code": ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "remote code", "never run"),
    "code elsewhere": (
        {"model_type": None, "auto_map": {"AutoConfig": "someone/code--a.B"}},
        "remote code",
        "'None' is not an architecture of transformers",
    ),
    "mxfp4": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        "quantization",
        "quantized by 'mxfp4', which is not served .awq, bitsandbytes, compressed-tensors, fp8, g",
    ),
    "eetq": ({"quantization_config": {"quant_method": "eetq"}}, "quantization", "by 'eetq'"),
    "no method": ({"quantization_config": {}}, "quantization", "quantized by 'None'"),
    "no object": ({"quantization_config": "gptq"}, "quantization", "quantized by 'None'"),
    "nested quantization": (
        {"text_config": {"quantization_config": {"quant_method": "fbgemm_fp8"}}},
        "quantization",
        "quantized by 'fbgemm_fp8'",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_refused(name: str, model_dir: Path) -> None:
    changes, _, message = SETTINGS[name]
    edit(model_dir / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find(model_dir)
    assert str(model_dir / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("check", settings.CONFIG_CHECKS)
def test_every_check_is_needed(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check taken away once: what it alone refuses is then let in."""
    own = [changes for changes, by, _ in SETTINGS.values() if by == check]
    assert len(own) >= 2
    for changes in own:
        with pytest.raises(UnsupportedModelError, match=r"config\.json"):
            settings.check_config(Path("config.json"), changes)
    monkeypatch.delitem(settings.CONFIG_CHECKS, check)
    for changes in own:
        settings.check_config(Path("config.json"), changes)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"a": 1, "a": 2}', "config.json: the key 'a' stands twice"),
        ("config.json", "[" * 5000, "config.json: nested more than 64 levels"),
        ("config.json", "[]", "config.json: not a JSON object"),
        ("config.json", " " * (settings.CONFIG_BYTES + 1), "config.json: more than the 16777216"),
        ("config.json", '{"a": "\\ud800"}', "half of a surrogate pair"),
        ("config.json", "\xff", "config.json: not JSON"),
        ("generation_config.json", "{", "generation_config.json: not JSON"),
        ("generation_config.json", '{"num_beams": 1000000}', "num_beams is 1000000, expected"),
        ("generation_config.json", '{"eos_token_id": [1, "2"]}', "eos_token_id is 2, expected"),
        ("tokenizer_config.json", "[" * 5000, "tokenizer_config.json: nested more than"),
        ("special_tokens_map.json", "1", "special_tokens_map.json: not a JSON object"),
        ("model.safetensors.index.json", "{", "index.json: not JSON"),
        ("adapter_config.json", "{}", "an adapter .adapter_config.json., whose base lies elsew"),
    ],
)
def test_a_file_that_is_not_read(file: str, content: str, message: str, model_dir: Path) -> None:
    (model_dir / file).write_text(content, encoding="latin-1")
    with pytest.raises(UnsupportedModelError, match=message):
        find(model_dir)


@pytest.mark.parametrize("key", ["to_dict", "get_text_config", "__class__", "from_pretrained"])
def test_a_key_never_replaces_a_method(key: str, model_dir: Path) -> None:
    edit(model_dir / "config.json", **{key: 3})
    with pytest.raises(UnsupportedModelError, match="config.json"):
        load_config(find(model_dir))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such directory; give a model directory or a hub name"),
        ("a/b/c", "a/b/c: no such directory"),
        ("/nowhere", "/nowhere: no such directory"),
        ("someone/nothing-here", "someone/nothing-here: cannot load the files"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find(name)
