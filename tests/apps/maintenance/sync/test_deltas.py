"""Deltas: the smallest is chosen, the result is proven, nothing inflates beyond its length."""

import hashlib

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.maintenance.sync.deltas import Form, decode, encode, parcels_of
from apps.maintenance.sync.outcomes import Outcome, RefusedError
from benchmarks.edge_models import make_bundle


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def decoded(form: Form, data: bytes, base: bytes, target: bytes) -> bytes:
    return decode(form, data, base, length=len(target), sha256=digest_of(target))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=3000), st.binary(max_size=3000), st.sampled_from(list(Form)))
def test_every_form_brings_the_bundle_back(base: bytes, target: bytes, form: Form) -> None:
    if form.needs_base and len(base) < 8:
        base = base + bytes(8)  # a dictionary has eight bytes at least
    assert decoded(form, encode(form, target, base), base, target) == target


def test_the_smallest_form_comes_first_and_useless_ones_not_at_all() -> None:
    one, two = make_bundle(1), make_bundle(2)
    noise = np.random.default_rng(0).bytes(len(two))
    found = parcels_of(two, {"one": one, "noise": noise})
    sizes = [len(each.data) for each in found]
    assert sizes == sorted(sizes)
    assert found[0].base == "one"
    assert sizes[0] < len(encode(Form.ZSTD, two)) / 4
    assert {each.base for each in found} == {"", "one"}  # noise is of no help
    both = {form: len(encode(form, two, one)) for form in (Form.ZSTD_PATCH, Form.BSDIFF)}
    assert sizes[0] == min(both.values())


@pytest.mark.parametrize("form", list(Form))
def test_another_base_or_an_altered_delta_is_seen(form: Form) -> None:
    one, two, three = (make_bundle(version) for version in (1, 2, 3))
    data = encode(form, two, one)
    if form.needs_base:
        with pytest.raises(RefusedError) as refusal:
            decoded(form, data, three, two)
        assert refusal.value.outcome is Outcome.DELTA_ALTERED
    for at in range(0, len(data), max(1, len(data) // 50)):
        wrong = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            found = decoded(form, wrong, one, two)
        except RefusedError:
            continue
        assert found == two  # a byte without a meaning


@pytest.mark.parametrize("form", list(Form))
def test_truncated_data_is_refused(form: Form) -> None:
    one, two = make_bundle(1), make_bundle(2)
    data = encode(form, two, one)
    for tenth in range(10):
        with pytest.raises(RefusedError):
            decoded(form, data[: len(data) * tenth // 10], one, two)


def test_a_bomb_stops_at_the_signed_length() -> None:
    bomb = zstd.compress(bytes(2**28))
    with pytest.raises(RefusedError, match="whole frame of 100 bytes"):
        decode(Form.ZSTD, bomb, b"", length=100, sha256="0" * 64)
