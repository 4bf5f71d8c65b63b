"""The bundle: one directory with weights, plan, key constants and what was measured."""
