"""Identities: RFC 8785 bytes for documents, a tensor's digest for its values and nothing else."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from meristem.store.canonical import canonical, digest_bytes, digest_document, digest_tensor, short
from meristem.store.packs import safetensors_entries


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # The examples of RFC 8785, sections 3.2.2 and 3.2.3, and its appendix B.
        ([333333333.33333329, 1e30, 4.50, 2e-3, 1e-27], b"[333333333.3333333,1e+30,4.5,0.002,1e-27]"),
        ("\u20ac$\u000f\nA'B\"\\\"/", b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\"/"'),
        ({"\u20ac": 1, "\r": 2, "1": 3, "\U0001f600": 4, "\ufb33": 5, "\u00f6": 6},
         '{"\\r":2,"1":3,"\u00f6":6,"\u20ac":1,"\U0001f600":4,"\ufb33":5}'.encode()),
        ([None, True, False, {}, []], b"[null,true,false,{},[]]"),
        ([0.0, -0.0, 1.0, 1e21, 5e-324], b"[0,0,1,1e+21,5e-324]"),
    ],
)  # fmt: skip
def test_the_bytes_are_those_of_rfc_8785(value, expected):
    assert canonical(value) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, -(2**53), "\ud800", {1: 2}])
def test_what_json_cannot_carry_is_refused(value):
    with pytest.raises(ValueError):
        canonical({"a": value})


def test_a_document_has_one_digest_whatever_the_order_of_its_keys():
    assert digest_document({"b": 1, "a": [2.0]}) == digest_document({"a": [2], "b": 1.0})
    assert digest_document({"a": 1}) != digest_document({"a": 2})


def test_a_file_has_the_digest_that_sha256sum_prints():
    assert digest_bytes(b"abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert short(digest_bytes(b"abc")) == "ba7816bf8f01"


def test_a_tensor_has_one_digest_in_every_file(tmp_path):
    """The same tensors under other metadata, other names and in another order."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7], dtype=np.int64)
    saved = [
        ({"x": a, "y": b}, None),
        ({"x": a, "y": b}, {"by": "me"}),
        ({"first": b, "second": a}, {"z": "z" * 99}),
    ]
    found = []
    for number, (tensors, about) in enumerate(saved):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata=about)
        body = path.read_bytes()
        found.append(
            {
                digest_tensor(dtype, shape, body[at : at + length])
                for dtype, shape, at, length in safetensors_entries(path).values()
            }
        )
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3


def test_dtype_and_shape_belong_to_a_tensor():
    data = bytes(8)
    digests = {
        digest_tensor(d, s, data)
        for d, s in [("F32", (2,)), ("F32", (1, 2)), ("F32", (2, 1)), ("I32", (2,)), ("U8", (8,))]
    }
    assert len(digests) == 5
    assert digest_tensor("F32", [2], data) == digest_tensor("F32", (2,), memoryview(data))
    assert digest_bytes(data) not in digests


def test_every_bit_of_a_float_counts():
    """-0.0 is not 0.0, and two NaNs are the same only with the same payload: nothing is compared as a number."""
    bits = [0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001]
    digests = [digest_tensor("F32", (1,), struct.pack("<I", word)) for word in bits]
    assert len(set(digests)) == 4
    assert digests[2] == digest_tensor("F32", (1,), struct.pack("<f", float("nan")))
