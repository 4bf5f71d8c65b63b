"""The calibration prompts that need no data of the user's."""
