"""One field out of a form."""

import pytest

from mesh_llm.wire.http1_multipart import boundary_of, form_field

FORM = (
    b"--XX\r\n"
    b'Content-Disposition: form-data; name="file"; filename="model"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n"
    b"\x00\xff--X\r\n\r\n--XY\r\n"
    b"--XX\r\n"
    b'content-disposition: form-data; name="model"\r\n\r\n'
    b"tiny\r\n"
    b"--XX--\r\n"
)


def test_the_boundary():
    assert boundary_of(b"multipart/form-data; boundary=XX") == b"XX"
    assert boundary_of(b'Multipart/Form-Data; charset=utf-8; boundary="a b"') == b"a b"
    assert boundary_of(b"multipart/form-data") is None
    assert boundary_of(b"application/json; boundary=XX") is None


@pytest.mark.parametrize("prefix", [b"", b"preamble\r\n"])
def test_the_field_is_found_behind_a_file(prefix: bytes):
    assert form_field(prefix + FORM, b"XX", b"model") == b"tiny"


def test_a_file_is_not_a_field():
    assert form_field(FORM, b"XX", b"file") is None


@pytest.mark.parametrize(
    "body",
    [b"", b"--XX", b"--XX--\r\n", b"--XX\r\n", b"--XX\r\nx", FORM[:-20], b"--XXjunk\r\n\r\n", b"--XX\r\n" * 1000],
)
def test_broken_forms_have_no_field(body: bytes):
    assert form_field(body, b"XX", b"model") is None


def test_a_long_value_is_not_taken():
    assert form_field(FORM.replace(b"tiny", b"t" * 2000), b"XX", b"model") is None
