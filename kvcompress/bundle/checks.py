"""Facts on which the parts of a bundle must agree, checked once each part could be read.

Every check looks at one fact and returns the problem, or None. The checks have names, so that a
test can take one away and see which bundle is then accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvcompress.bundle import manifest
from kvcompress.checkpoint.load import reading
from kvcompress.checkpoint.tensors import Header, headers, weight_map
from kvcompress.quant.weights import FORMATS
from kvcompress.strict import shown
from kvcompress.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from kvcompress.bundle.read import Bundle

_AGAIN: Final = "copy or export the bundle again"
_PROFILE: Final = "profile and export again"


def problem_of(bundle: Bundle) -> str | None:
    """The first thing in which two parts of a bundle differ, as one line."""
    for check in CHECKS.values():
        found = check(bundle)
        if found is not None:
            return found
    return None


def _pointer(bundle: Bundle) -> str | None:
    wanted = {"schema": bundle.manifest.schema_version, "manifest": manifest.MANIFEST}
    if bundle.checkpoint.settings.get("kvcompress") == wanted:
        return None
    return f"{bundle.path / 'config.json'}: its kvcompress entry is not {wanted}; {_AGAIN}"


def _format(bundle: Bundle) -> str | None:
    weights = FORMATS[bundle.manifest.weights.format]
    if weights.matches(bundle.checkpoint.settings.get("quantization_config")):
        return None
    return (
        f"{bundle.path / 'config.json'}: its quantization_config is not that of {weights.name} "
        f"weights; {_AGAIN}"
    )


def _weight_files(bundle: Bundle) -> set[str]:
    listed = {path for path in bundle.manifest.sizes_bytes if path.endswith(".safetensors")}
    return listed - {manifest.PARAMS}


def _tensors(bundle: Bundle) -> dict[str, dict[str, Header]]:
    return {file: headers(bundle.path / file) for file in sorted(_weight_files(bundle))}


def _index_tensors(bundle: Bundle) -> str | None:
    found = {(name, file) for file, names in _tensors(bundle).items() for name in names}
    if found == {*weight_map(bundle.path).items()}:
        return None
    return (
        f"{bundle.path / manifest.INDEX}: does not list the tensors that are in the files; {_AGAIN}"
    )


def _dtypes(bundle: Bundle) -> str | None:
    weights = FORMATS[bundle.manifest.weights.format]
    for file, names in _tensors(bundle).items():
        for name, header in names.items():
            if header.dtype not in weights.dtypes:
                return (
                    f"{bundle.path / file}: {shown(name)} is {header.dtype}, which {weights.name} "
                    f"weights do not have; {_AGAIN}"
                )
    return None


def _weights_size(bundle: Bundle) -> str | None:
    sizes = bundle.manifest.sizes_bytes
    found = sum(sizes[file] for file in _weight_files(bundle))
    said = bundle.manifest.weights.size_bytes
    if found == said:
        return None
    return (
        f"{bundle.path / manifest.MANIFEST}: says that the weights have {said} bytes, their files "
        f"have {found}; {_AGAIN}"
    )


def _config_hash(bundle: Bundle) -> str | None:
    if _hash(bundle) == bundle.manifest.base_model.config_hash:
        return None
    return f"{bundle.path / 'config.json'}: describes another model than the manifest; {_AGAIN}"


def _hash(bundle: Bundle) -> str:
    from kvcompress.runtime.model.families import config_hash

    with reading(str(bundle.path), "config.json"):
        return config_hash(bundle.config)


def _plan_model(bundle: Bundle) -> str | None:
    from kvcompress.runtime.model.families import difference, shape_of

    with reading(str(bundle.path), "config.json"):
        shape = shape_of(bundle.config)
    where = f"{bundle.path / manifest.PLAN}: "
    if bundle.plan.model.config_hash != _hash(bundle):
        return f"{where}was made for another model than config.json; {_AGAIN}"
    differs = difference(bundle.plan.model, shape)
    if differs is None:
        return None
    return f"{where}its model has another {differs} than config.json; {_AGAIN}"


def _profile_model(bundle: Bundle) -> str | None:
    from kvcompress.runtime.model.families import difference

    # a plan that was given by hand may be for other settings of the same layers
    same = {"config_hash": bundle.plan.model.config_hash}
    differs = difference(bundle.profile.shape.model_copy(update=same), bundle.plan.model)
    if differs is None:
        return None
    return (
        f"{bundle.path / manifest.PROFILE}: its model has another {differs} than the plan's; "
        f"{_AGAIN}"
    )


def _profile_tokenizer(bundle: Bundle) -> str | None:
    if bundle.plan.tokenizer_hash is None:  # such a plan names no tokens
        return None
    if bundle.profile.tokenizer_hash == bundle.manifest.tokenizer_hash:
        return None
    return f"{bundle.path / manifest.PROFILE}: was made with another tokenizer; {_PROFILE}"


def _profile_params(bundle: Bundle) -> str | None:
    found = next(e.sha256 for e in bundle.manifest.files if e.path == manifest.PARAMS)
    if bundle.profile.params_sha256 in (None, found):
        return None
    return (
        f"{bundle.path / manifest.PARAMS}: not the key constants of the profile beside it; {_AGAIN}"
    )


def _recipe_weights(bundle: Bundle) -> str | None:
    asked, stored = bundle.recipe.weights, bundle.manifest.weights.format
    if asked == stored:
        return None
    return f"{bundle.path / manifest.RECIPE}: asks for {asked} weights, they are {stored}; {_AGAIN}"


def _vocabulary(bundle: Bundle) -> int | None:
    size = getattr(bundle.config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else None


def _repeat_ids(bundle: Bundle) -> str | None:
    size, ids = _vocabulary(bundle), bundle.plan.repeat_ids
    if not ids or size is None or max(ids) < size:
        return None
    return (
        f"{bundle.path / manifest.PLAN}: repeat_ids names token {max(ids)}, the model has {size}; "
        f"{_PROFILE}"
    )


def _trained(bundle: Bundle) -> str | None:
    """A trained scorer has one weight for each channel of the hidden state, and a constant."""
    hidden = getattr(bundle.config.get_text_config(decoder=True), "hidden_size", None)
    wanted = {hidden + 1} if isinstance(hidden, int) else set()
    for name, parts in bundle.params.scorer.items():
        if {part.shape[1] for part in parts} != wanted:
            return (
                f"{bundle.path / manifest.PARAMS}: {name} was trained for hidden states of another "
                f"size than {hidden}; {_PROFILE}"
            )
    return None


def _tokenizer(bundle: Bundle) -> str | None:
    if tokenizer_hash(bundle.tokenizer) == bundle.manifest.tokenizer_hash:
        return None
    return f"{bundle.path}: its tokenizer is not the one in the manifest; {_AGAIN}"


def _plan_tokenizer(bundle: Bundle) -> str | None:
    if bundle.plan.tokenizer_hash in (None, bundle.manifest.tokenizer_hash):
        return None
    return (
        f"{bundle.path / manifest.PLAN}: was made with another tokenizer, so its special and "
        f"punctuation ids mean other tokens; {_PROFILE}"
    )


CHECKS: Final[dict[str, Callable[[Bundle], str | None]]] = {
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
