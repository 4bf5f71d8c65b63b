"""The tests of `make quick`, which a contributor runs while editing: for every part of the package
those that say most in a second or two. `make test` has all of them.

    python -m tests.quick    # their names, for pytest
"""

from __future__ import annotations

from typing import Final

# a folder of the package, `runtime` room by room: its tests, each a file or one test of a file
QUICK: Final[dict[str, tuple[str, ...]]] = {
    "": (
        *("test_plan.py", "test_recipe.py", "test_accounting.py", "test_quick.py"),
        "test_layout.py::test_imports_point_down",
        "test_layout.py::test_no_import_goes_in_a_circle",
        "test_layout.py::test_the_rooms_of_the_runtime_stand_in_order",
        "test_layout.py::test_public_surface",
    ),
    "bench": ("bench/test_result.py",),
    "bundle": ("bundle/test_run.py::test_loaded_logits_are_those_of_the_exported_model",),
    "checkpoint": ("checkpoint/test_tensors.py",),
    "cli": ("cli/test_words.py", "cli/test_progress.py"),
    "demo": ("demo/test_plans.py",),
    "evaluate": ("evaluate/test_session.py", "evaluate/test_table.py", "evaluate/test_report.py"),
    "evict": ("evict/test_scorers.py", "evict/test_digest.py"),
    "kernels": ("kernels/test_decode.py",),
    "league": ("league/test_verdicts.py",),
    "measure": ("measure/test_cells.py", "measure/test_tables.py"),
    "profile": ("profile/test_budget.py",),
    "quant": ("quant/test_codec.py",),
    "tasks": ("evaluate/test_tasks.py",),
    "runtime": ("runtime/test_chat.py",),
    "runtime/cache": ("runtime/test_seen_text.py",),
    "runtime/check": ("runtime/test_doctor.py",),
    "runtime/hf": (
        "runtime/test_seam.py::test_a_forward_is_announced_however_the_cache_is_passed",
    ),
    "runtime/layer": ("runtime/test_fused.py::test_any_number_of_queries",),
    "runtime/model": ("runtime/test_rotation.py",),
    "runtime/prompt": (
        "runtime/test_score_queries.py::test_rules_for_each_request_rank_by_the_same_estimates",
    ),
    "runtime/recall": ("runtime/test_recall.py::test_a_byte_budget_becomes_a_resident_part",),
    "runtime/saved": ("runtime/test_persist_refused.py",),
    "runtime/static": ("runtime/test_static.py::test_a_prompt_shorter_than_the_exact_slots",),
    "runtime/step": (
        "runtime/test_fused.py::test_softcap_and_sinks",
        "runtime/test_fused.py::test_codes_are_those_of_the_codec",
    ),
    "runtime/store": (
        "runtime/test_cache.py::test_a_cap_holds_for_any_length_and_punctuation_goes_first",
        "runtime/test_cache.py::test_every_turn_keeps_its_quota",
        "runtime/test_cache.py::test_rows_can_be_repeated_and_selected",
    ),
}


def names() -> list[str]:
    """What pytest is to run, each once."""
    return list(dict.fromkeys(f"tests/{test}" for tests in QUICK.values() for test in tests))


if __name__ == "__main__":
    print(" ".join(names()))
