"""Where README had `shape_of` imported from before it was a name of `kvcompress`."""

from kvcompress.runtime.model.families import shape_of as shape_of
