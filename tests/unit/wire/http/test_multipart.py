"""Forms with files."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.wire.http.multipart import MOST_PARTS, FormError, FormPart, boundary_of, parse_form, write_form

names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
parts = st.lists(
    st.builds(FormPart, names, st.binary(max_size=200), st.sampled_from([None, "file"])), min_size=1, max_size=8
)


@given(parts)
def test_what_is_written_is_read_again(form: list[FormPart]):
    kind, body = write_form(form)
    assert parse_form(body, boundary_of(kind)) == form


@given(st.binary(max_size=400))
def test_nothing_but_form_error_comes_of_any_bytes(body: bytes):
    with contextlib.suppress(FormError):
        parse_form(b"--x" + body, b"x")


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data; charset=utf-8; boundary="a b"', b"a b"),
        (b"multipart/form-data;boundary=abc; charset=utf-8", b"abc"),
    ],
)
def test_the_boundary_is_found(header: bytes, boundary: bytes):
    assert boundary_of(header) == boundary


@pytest.mark.parametrize(
    "header", [b"", b"application/json", b"multipart/form-data", b"multipart/form-data; boundary="]
)
def test_a_header_without_a_boundary_is_refused(header: bytes):
    with pytest.raises(FormError, match="no boundary"):
        boundary_of(header)


def test_a_preamble_and_further_headers_are_passed_over():
    body = (
        b'before\r\n--x\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n2\r\n--x--'
    )
    assert parse_form(body, b"x") == [FormPart("a", b"1\r\n2")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--y--",
        b"--x",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nno end',
        b"--x\r\nContent-Type: text/plain\r\n\r\n1\r\n--x--",
        b'--x\r\nContent-Disposition: form-data; name="a\n"\r\n\r\n1\r\n--x--',
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n' + b"X: y\r\n" * 500 + b"\r\n1\r\n--x--",
    ],
)
def test_what_is_not_well_formed_is_refused(body: bytes):
    with pytest.raises(FormError):
        parse_form(body, b"x")


def test_a_form_has_a_limited_number_of_parts():
    one = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    assert len(parse_form(one * MOST_PARTS + b"--x--", b"x")) == MOST_PARTS
    with pytest.raises(FormError, match="more than"):
        parse_form(one * (MOST_PARTS + 1) + b"--x--", b"x")
