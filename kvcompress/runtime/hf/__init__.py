"""The seam to transformers: only files of this folder know its private names.

`names` holds what changes between its releases, `attach` puts a plan on a model and takes it off,
`attached` is what a model then carries, `announce` tells a cache of every forward, `generate`
serves the calls of `generate`, and `attention` is the attention function.
"""
