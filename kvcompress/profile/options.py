"""The policy that options of the command line ask for."""

from __future__ import annotations

from typing import Final

from pydantic import ValidationError

from kvcompress.errors import PlanError
from kvcompress.plan import explain
from kvcompress.recipe import BytesPolicy, FastGenPolicy, Policy

TARGETS: Final = ("memory", "keep_ratio", "recovery")
_ONE_OF: Final = "--memory, --keep-ratio or --recovery"


def policy_from_options(own: Policy, **options: object) -> Policy:
    """The recipe's `own` policy where no option is given.

    What an option does not say is taken from `own` where that is a policy of the same kind.

    Args:
        options: ``memory``, ``keep_ratio``, ``recovery``, ``context``, ``batch``, or None.

    Raises:
        PlanError: if options contradict each other, miss a target or hold a value out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    targets = [name for name in TARGETS if name in given]
    if not given:
        return own
    if len(targets) > 1:
        raise PlanError(f"two targets at once; give one of {_ONE_OF}")
    if not targets and not isinstance(own, BytesPolicy):
        raise PlanError(f"--context and --batch belong to a byte target; add one of {_ONE_OF}")
    try:
        if targets == ["recovery"]:
            return _fastgen(own, given)
        return _bytes(own, given, bool(targets))
    except ValidationError as error:
        raise PlanError(f"options: {explain(error)}") from None


def _fastgen(own: Policy, given: dict[str, object]) -> Policy:
    if len(given) > 1:
        raise PlanError("--recovery takes no --context or --batch: it has no byte target")
    base = own.model_dump() if isinstance(own, FastGenPolicy) else {"kind": "fastgen"}
    return FastGenPolicy.model_validate({**base, **given})


def _bytes(own: Policy, given: dict[str, object], new_target: bool) -> Policy:
    base = own.model_dump() if isinstance(own, BytesPolicy) else {"kind": "bytes"}
    if new_target:
        base |= {"memory": None, "keep_ratio": None}
    return BytesPolicy.model_validate({**base, **given})
