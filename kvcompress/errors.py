"""Errors that a user's input can cause. Each message says what, where and what to do."""


class KVCompressError(Exception):
    """Base of every error that the command line prints as one line."""


class RecipeError(KVCompressError):
    """A recipe file that cannot be used; all its problems are in one message."""


class CalibrationError(KVCompressError):
    """Calibration data that is missing, empty or too short."""


class ProfileError(KVCompressError):
    """A profile directory that is missing, unfinished or made by other settings."""


class PlanError(KVCompressError):
    """A plan that does not fit the model, or a target that no plan reaches."""


class BundleError(KVCompressError):
    """A bundle that is damaged, foreign or from a newer version."""


class UnsupportedModelError(KVCompressError):
    """A model whose cache this runtime cannot compress correctly."""


class PositionRangeWarning(UserWarning):
    """A token's position is beyond what the plan's key constants were derived for."""


class UntestedReleaseWarning(UserWarning):
    """The installed transformers is newer than every release that was tested."""


class CalibrationWarning(UserWarning):
    """Built-in calibration is made of other text than it should be."""
