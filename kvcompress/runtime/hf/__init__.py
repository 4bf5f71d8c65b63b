"""The seam to transformers: only files of this folder know its private names.

`attach` puts a plan on a model and takes it off, `announce` tells a cache of every forward,
`generate` serves the calls of `generate`, and `attention` is the attention function.
`runtime.names` holds the names that change between releases of transformers, and
`runtime.model.attached` the record that a model with a plan carries.
"""
