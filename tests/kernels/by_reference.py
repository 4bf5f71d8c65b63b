"""The operators of a decode step by their references, in place of `kvcompress.kernels.ops`."""

from __future__ import annotations

from kvcompress.kernels.available import TritonStatus
from kvcompress.kernels.decode_combine.flat import decode_combine as decode_combine
from kvcompress.kernels.decode_split import flat
from kvcompress.kernels.kv_append import reference as append
from kvcompress.kernels.row_advance.reference import row_advance as row_advance
from kvcompress.kernels.score_select.reference import score_select as score_select
from kvcompress.quant.codec import Codes

READY = TritonStatus("reference", None)


def decode_split(*a):
    return flat.decode_split(*a[:4], Codes(*a[4:7]), Codes(*a[7:10]), *a[10:])


def kv_append(*a):
    return append.kv_append(*a[:7], Codes(*a[7:10]), Codes(*a[10:13]), *a[13:])
