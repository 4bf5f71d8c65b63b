"""The operators of a decode step by their references, in place of `kvcompress.kernels.ops`."""

from __future__ import annotations

from kvcompress.kernels.available import TritonStatus
from kvcompress.kernels.decode_combine.reference import decode_combine as decode_combine
from kvcompress.kernels.decode_split.reference import decode_pieces as decode_pieces
from kvcompress.kernels.kv_append.reference import kv_append as kv_append
from kvcompress.kernels.row_advance.reference import row_advance as row_advance
from kvcompress.kernels.score_select.reference import score_select as score_select

READY = TritonStatus("reference", None)
