"""Facts on which the parts of a bundle must agree, checked once each part could be read.

Every check looks at one fact. The checks have names, so that a test can take one away and see which
bundle is then accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvcompress.bundle import manifest
from kvcompress.checkpoint.load import reading
from kvcompress.checkpoint.tensors import Header, headers, weight_map
from kvcompress.errors import BundleError
from kvcompress.quant.weights import FORMATS
from kvcompress.strict import shown
from kvcompress.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from kvcompress.bundle.read import Bundle

_CONFIG: Final = "config.json"
_AGAIN: Final = "copy or export the bundle again"
_PROFILE: Final = "profile and export again"


def check_parts(bundle: Bundle) -> None:
    """See the module docstring.

    Raises:
        BundleError: for the first thing in which two parts of a bundle differ.
    """
    for check in CHECKS.values():
        check(bundle)


def _demand(holds: bool, bundle: Bundle, file: str, problem: str, todo: str = _AGAIN) -> None:
    if not holds:
        raise BundleError(f"{bundle.path / file}: {problem}; {todo}")


def _pointer(bundle: Bundle) -> None:
    wanted = {"schema": bundle.manifest.schema_version, "manifest": manifest.MANIFEST}
    found = bundle.checkpoint.settings.get("kvcompress")
    _demand(found == wanted, bundle, _CONFIG, f"its kvcompress entry is not {wanted}")


def _format(bundle: Bundle) -> None:
    weights = FORMATS[bundle.manifest.weights.format]
    matches = weights.matches(bundle.checkpoint.settings.get("quantization_config"))
    problem = f"its quantization_config is not that of {weights.name} weights"
    _demand(matches, bundle, _CONFIG, problem)


def _weight_files(bundle: Bundle) -> set[str]:
    listed = {path for path in bundle.manifest.sizes_bytes if path.endswith(".safetensors")}
    return listed - {manifest.PARAMS}


def _tensors(bundle: Bundle) -> dict[str, dict[str, Header]]:
    return {file: headers(bundle.path / file) for file in sorted(_weight_files(bundle))}


def _index_tensors(bundle: Bundle) -> None:
    found = {(name, file) for file, names in _tensors(bundle).items() for name in names}
    same = found == {*weight_map(bundle.path).items()}
    _demand(same, bundle, manifest.INDEX, "does not list the tensors that are in the files")


def _dtypes(bundle: Bundle) -> None:
    weights = FORMATS[bundle.manifest.weights.format]
    for file, names in _tensors(bundle).items():
        for name, header in names.items():
            problem = f"{shown(name)} is {header.dtype}, which {weights.name} weights do not have"
            _demand(header.dtype in weights.dtypes, bundle, file, problem)


def _weights_size(bundle: Bundle) -> None:
    sizes = bundle.manifest.sizes_bytes
    found = sum(sizes[file] for file in _weight_files(bundle))
    said = bundle.manifest.weights.size_bytes
    problem = f"says that the weights have {said} bytes, their files have {found}"
    _demand(found == said, bundle, manifest.MANIFEST, problem)


def _config_hash(bundle: Bundle) -> None:
    same = _hash(bundle) == bundle.manifest.base_model.config_hash
    _demand(same, bundle, _CONFIG, "describes another model than the manifest")


def _hash(bundle: Bundle) -> str:
    from kvcompress.runtime.model.families import config_hash

    with reading(str(bundle.path), _CONFIG):
        return config_hash(bundle.config)


def _plan_model(bundle: Bundle) -> None:
    from kvcompress.runtime.model.families import difference, shape_of

    with reading(str(bundle.path), _CONFIG):
        shape = shape_of(bundle.config)
    same = bundle.plan.model.config_hash == _hash(bundle)
    _demand(same, bundle, manifest.PLAN, "was made for another model than config.json")
    differs = difference(bundle.plan.model, shape)
    problem = f"its model has another {differs} than config.json"
    _demand(differs is None, bundle, manifest.PLAN, problem)


def _profile_model(bundle: Bundle) -> None:
    from kvcompress.runtime.model.families import difference

    # a plan that was given by hand may be for other settings of the same layers
    same = {"config_hash": bundle.plan.model.config_hash}
    differs = difference(bundle.profile.shape.model_copy(update=same), bundle.plan.model)
    problem = f"its model has another {differs} than the plan's"
    _demand(differs is None, bundle, manifest.PROFILE, problem)


def _profile_tokenizer(bundle: Bundle) -> None:
    if bundle.plan.tokenizer_hash is None:  # such a plan names no tokens
        return
    same = bundle.profile.tokenizer_hash == bundle.manifest.tokenizer_hash
    _demand(same, bundle, manifest.PROFILE, "was made with another tokenizer", _PROFILE)


def _profile_params(bundle: Bundle) -> None:
    found = next(e.sha256 for e in bundle.manifest.files if e.path == manifest.PARAMS)
    same = bundle.profile.params_sha256 in (None, found)
    _demand(same, bundle, manifest.PARAMS, "not the key constants of the profile beside it")


def _recipe_weights(bundle: Bundle) -> None:
    asked, stored = bundle.recipe.weights, bundle.manifest.weights.format
    problem = f"asks for {asked} weights, they are {stored}"
    _demand(asked == stored, bundle, manifest.RECIPE, problem)


def _repeat_ids(bundle: Bundle) -> None:
    size = getattr(bundle.config.get_text_config(decoder=True), "vocab_size", None)
    ids = bundle.plan.repeat_ids
    if ids and isinstance(size, int):
        problem = f"repeat_ids names token {max(ids)}, the model has {size}"
        _demand(max(ids) < size, bundle, manifest.PLAN, problem, _PROFILE)


def _trained(bundle: Bundle) -> None:
    """A trained scorer has one weight for each channel of the hidden state, and a constant."""
    hidden = getattr(bundle.config.get_text_config(decoder=True), "hidden_size", None)
    wanted = {hidden + 1} if isinstance(hidden, int) else set()
    for name, parts in bundle.params.scorer.items():
        same = {part.shape[1] for part in parts} == wanted
        problem = f"{name} was trained for hidden states of another size than {hidden}"
        _demand(same, bundle, manifest.PARAMS, problem, _PROFILE)


def _tokenizer(bundle: Bundle) -> None:
    same = tokenizer_hash(bundle.tokenizer) == bundle.manifest.tokenizer_hash
    _demand(same, bundle, "", "its tokenizer is not the one in the manifest")


def _plan_tokenizer(bundle: Bundle) -> None:
    same = bundle.plan.tokenizer_hash in (None, bundle.manifest.tokenizer_hash)
    problem = (
        "was made with another tokenizer, so its special and punctuation ids mean other tokens"
    )
    _demand(same, bundle, manifest.PLAN, problem, _PROFILE)


CHECKS: Final[dict[str, Callable[[Bundle], None]]] = {
    "pointer": _pointer,
    "weight format": _format,
    "tensors of the index": _index_tensors,
    "dtypes of tensors": _dtypes,
    "size of the weights": _weights_size,
    "configuration": _config_hash,
    "model of the plan": _plan_model,
    "model of the profile": _profile_model,
    "constants of the profile": _profile_params,
    "trained parameters": _trained,
    "tokenizer": _tokenizer,
    "tokenizer of the plan": _plan_tokenizer,
    "tokenizer of the profile": _profile_tokenizer,
    "repeated tokens": _repeat_ids,
    "weights of the recipe": _recipe_weights,
}
