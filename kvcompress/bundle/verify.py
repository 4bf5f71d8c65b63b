"""Running a bundle to see that it works: it decodes and generates, plain and compressed.

An export runs `python -m kvcompress.bundle.verify BUNDLE --expected FILE` as a fresh process that
reloads what was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from kvcompress.bundle.expected import Expected, check_parts_written
from kvcompress.bundle.load import serve
from kvcompress.bundle.read import Bundle, load_weights, open_bundle
from kvcompress.errors import BundleError, KVCompressError
from kvcompress.plan import HeadPlan, Plan, uniform
from kvcompress.runtime.check.compare import (
    allowed,
    distance,
    fixed_ids,
    generated,
    same_text_steps,
)
from kvcompress.runtime.check.stored import listen, stored_problem
from kvcompress.runtime.names import as_argument, cache_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from kvcompress.checkpoint.load import DeviceMap
    from kvcompress.quant.keystats import KVParams

CHECK_TOKENS: Final = 48
_STEPS: Final = 8


@dataclass(frozen=True)
class VerifyReport:
    """What was checked; every figure is ‖a − b‖ / ‖b‖ over the logits of a short forward.

    Attributes:
        digest: sha256 of the manifest.
        files: number of files whose size and sha256 were checked.
        reload_error: saved weights against the model they were saved from; None outside an export.
        lossless_error: a compressed cache that keeps everything against transformers' own cache.
        plan_error: the bundle's own plan against transformers' own cache; not a fault if large.
        generate_error: as lossless_error, through `model.generate` on a model made ready as `load`
            does.
        allowed_error: what the errors above were held to, but plan_error: what rounding explains in
            this model.
    """

    path: str
    digest: str
    files: int
    reload_error: float | None
    lossless_error: float
    plan_error: float
    generate_error: float
    allowed_error: float


def verify(
    path: Path | str, expected: Path | None = None, device_map: DeviceMap = None
) -> VerifyReport:
    """Check hashes and schema, then run the bundle.

    Args:
        expected: a file of `Expected`, what the bundle was to hold.

    Raises:
        BundleError: for the first thing that is wrong.
    """
    bundle = open_bundle(path)
    model = load_weights(bundle, device_map)
    wanted = None if expected is None else Expected.load(expected)
    if wanted is not None:
        check_parts_written(bundle, model, wanted)
    limit = allowed(model, lambda: _decode(model, cache=None))
    reload_error = None
    if wanted is not None:
        reload_error = distance(check_logits(model), wanted.logits)
        _demand(bundle, limit, reload_error, "the reloaded model")
    plain, written = _decode(model, cache=None), _generate(bundle, model)
    everything = HeadPlan(full=True, k_dtype="model", v_dtype="model")
    lossless = uniform(bundle.plan.model, everything, max_position=bundle.plan.max_position)
    with _attached(model, lossless, None):
        lossless_error = distance(_decode_compressed(bundle, model), plain)
    _demand(bundle, limit, lossless_error, "a compressed cache that keeps everything")
    for plan, params in ((lossless, None), (bundle.plan, bundle.params)):
        _demand_stored(bundle, model, plan, params)
    with _attached(model, bundle.plan, bundle.params):
        plan_error = distance(_decode_compressed(bundle, model), plain)
    serve(model, bundle)
    with _attached(model, lossless, None):
        again = _generate(bundle, model)
    same = same_text_steps(again[0], written[0])
    generate_error = distance(again[1][:same], written[1][:same])
    _demand(bundle, limit, generate_error, "generate with a cache that keeps everything")
    with _attached(model, bundle.plan, bundle.params):
        _generate(bundle, model)
    return VerifyReport(
        path=str(path),
        digest=bundle.digest,
        files=len(bundle.manifest.files) + 1,
        reload_error=reload_error,
        lossless_error=lossless_error,
        plan_error=plan_error,
        generate_error=generate_error,
        allowed_error=limit,
    )


def check_logits(model: PreTrainedModel) -> Tensor:
    """float32 logits [CHECK_TOKENS, vocabulary] of one plain forward."""
    with torch.inference_mode():
        ids = fixed_ids(model, CHECK_TOKENS)
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def _decode(model: PreTrainedModel, cache: Cache | None) -> Tensor:
    """Logits [_STEPS, vocabulary] of single-token steps, which read what the prompt stored."""
    ids = fixed_ids(model, CHECK_TOKENS)
    start = ids.shape[1] - _STEPS
    rows = []
    with torch.inference_mode():
        output = model(input_ids=ids[:, :start], **as_argument(cache), use_cache=True)
        for step in range(start, ids.shape[1]):
            output = model(
                input_ids=ids[:, step : step + 1],
                **as_argument(cache_of(output)),
                use_cache=True,
            )
            rows.append(output.logits[0, -1].float().cpu())
    return torch.stack(rows)


@contextmanager
def _attached(model: PreTrainedModel, plan: Plan, params: KVParams | None) -> Iterator[None]:
    from kvcompress.runtime.hf.attach import attach, detach

    attach(model, plan, params)
    try:
        yield
    finally:
        detach(model)


def _decode_compressed(bundle: Bundle, model: PreTrainedModel) -> Tensor:
    """`_decode` through the cache of the plan that is attached."""
    from kvcompress.runtime.cache.new import new_cache

    logits = _decode(model, new_cache(model))
    _demand_finite(bundle, logits)
    return logits


def _generate(bundle: Bundle, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Ids [steps] and logits [steps, vocabulary] of a short `model.generate`.

    Raises:
        BundleError: where logits are not finite, or a plan is attached and its cache was not used.
    """
    from kvcompress.runtime.cache.cache import CompressedCache
    from kvcompress.runtime.model.attached import attached

    ids, logits, cache = generated(model, fixed_ids(model, CHECK_TOKENS), _STEPS)
    if isinstance(cache, CompressedCache) != (attached(model) is not None):
        raise BundleError(
            f"{bundle.path}: generate used another cache than the plan's; report this as a bug"
        )
    _demand_finite(bundle, logits)
    return ids.cpu(), logits.cpu()


def _demand_finite(bundle: Bundle, logits: Tensor) -> None:
    if not bool(logits.isfinite().all()):
        raise BundleError(f"{bundle.path}: the model gives logits that are not finite")


def _demand_stored(
    bundle: Bundle, model: PreTrainedModel, plan: Plan, params: KVParams | None
) -> None:
    """What the cache of a plan holds of a prompt is what the model computed.

    Raises:
        BundleError: naming the layer.
    """
    from kvcompress.runtime.cache.new import new_cache

    ids = fixed_ids(model, CHECK_TOKENS)
    with torch.inference_mode(), _attached(model, plan, params):
        cache = new_cache(model)
        given = listen(cache)
        model(input_ids=ids, **as_argument(cache), use_cache=True)
    problem = stored_problem(cache, given)
    if problem is not None:
        raise BundleError(f"{bundle.path}: {problem}; profile again or report this as a bug")


def _demand(bundle: Bundle, limit: float, error: float, what: str) -> None:
    if not error <= limit:
        raise BundleError(
            f"{bundle.path}: logits of {what} differ by {error:.3g} of their size, allowed are "
            f"{limit:.3g}; export again with other weights and report this as a bug"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a VerifyReport as JSON; 2 and one line on stderr where the bundle is not sound."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(prog="python -m kvcompress.bundle.verify")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--expected", type=Path)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        report = verify(arguments.bundle, arguments.expected)
    except KVCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
