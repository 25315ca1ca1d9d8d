import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.source_ref import (
    RemoteModel,
    RepositoryFile,
    SourceRef,
    choose,
    is_safe_path,
    is_source,
    models_in,
    parse_source,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def ref(repository: str = "owner/repo", file: str = "", quant: str = "", revision: str = "main") -> SourceRef:
    return SourceRef(repository=repository, file=file, quant=quant, revision=revision)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:owner/repo", ref()),
        ("hf:owner/repo@v1.0", ref(revision="v1.0")),
        ("hf:owner/repo:Q4_K_M", ref(quant="Q4_K_M")),
        ("hf:owner/repo:q8_0@refs/pr/3", ref(quant="q8_0", revision="refs/pr/3")),
        ("hf:owner/repo:m-Q4.gguf", ref(file="m-Q4.gguf")),
        (f"hf:owner/repo:sub/dir/m.GGUF@{COMMIT}", ref(file="sub/dir/m.GGUF", revision=COMMIT)),
        ("hf:owner/repo/sub/m.gguf", ref(file="sub/m.gguf")),
        ("hf://owner/repo/m.gguf", ref(file="m.gguf")),
        ("https://huggingface.co/owner/repo", ref()),
        ("https://huggingface.co/owner/repo/", ref()),
        ("https://hf.co/owner/repo/tree/dev/sub", ref(revision="dev")),
        ("https://huggingface.co/owner/repo/blob/main/m%20one.gguf", ref(file="m one.gguf")),
        ("https://huggingface.co/owner/repo/resolve/v2/a/m.gguf?download=true", ref(file="a/m.gguf", revision="v2")),
        ("hf:owner/repo:m@home.gguf", ref(file="m@home.gguf")),
        ("hf:owner/repo:m@home.gguf@v1", ref(file="m@home.gguf", revision="v1")),
        ("https://huggingface.co/owner/repo/blob/refs/pr/7/m.gguf", ref(file="m.gguf", revision="refs/pr/7")),
        ("http://127.0.0.1:80/hub/owner/repo/resolve/main/m.gguf", ref(file="m.gguf")),
    ],
)  # fmt: skip
def test_sources(spec: str, expected: SourceRef) -> None:
    assert is_source(spec)
    assert parse_source(spec, "http://127.0.0.1:80/hub") == expected


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("owner/repo", "does not begin with hf:"),
        ("hf:repo", "'repo/' is not the name of a repository"),
        ("hf:", "not the name of a repository"),
        ("hf:own er/repo", "not the name of a repository"),
        ("hf:../repo", "not the name of a repository"),
        ("hf:owner/re..po", "not the name of a repository"),
        ("hf:owner/repo:", "nothing follows the colon"),
        ("hf:owner/repo@", "nothing follows the @"),
        ("hf:owner/repo@a b", "'a b' is not a revision"),
        ("hf:owner/repo@../x", "is not a revision"),
        ("hf:owner/repo/m.gguf:Q4", "names a file twice"),
        ("hf:owner/repo:../../m.gguf", "is not a file in a repository"),
        ("hf:owner/repo:a//m.gguf", "is not a file in a repository"),
        ("hf:owner/repo/m.bin", "is not a GGUF file"),
        ("hf:owner/repo:what is it", "neither a file nor a quantisation"),
        ("https://[huggingface.co/owner/repo", "is not an address"),
        ("https://example.org/owner/repo", "Hugging Face hub only"),
        ("https://huggingface.co/owner", "names no repository"),
        ("https://huggingface.co/owner/repo/discussions/1", "not the address of"),
        ("https://huggingface.co/owner/repo/blob/main", "names no file"),
        ("https://huggingface.co/owner/repo/blob/main/%2e%2e/m.gguf", "is not a file in a repository"),
    ],
)
def test_what_is_no_source_is_refused_with_the_form(spec: str, says: str) -> None:
    with pytest.raises(MeshError, match=r"hf:OWNER/REPO") as caught:
        parse_source(spec, "http://127.0.0.1:80")
    assert says in caught.value.message
    assert caught.value.code == "source_invalid"


@given(st.text(max_size=60))
def test_any_text_is_a_source_or_an_error(text: str) -> None:
    for spec in (text, f"hf:{text}", f"hf:o/r{text}", f"https://huggingface.co/{text}"):
        try:
            found = parse_source(spec)
        except MeshError:
            continue
        assert parse_source(str(found)) == found
        assert not found.file or is_safe_path(found.file)


def test_safe_paths() -> None:
    assert is_safe_path("a/b c/d.gguf")
    for path in ("", "/a", "a/", "a/../b", ".", "a\\b", "c:/x", "a\nb", "x" * 501):
        assert not is_safe_path(path)


def listed(*paths: str) -> list[RemoteModel]:
    return models_in([RepositoryFile(path=path, size=10) for path in paths], "o/r", "abc")


def chosen(models: list[RemoteModel], *, file: str = "", quant: str = "") -> str:
    return choose(models, SourceRef(repository="o/r", file=file, quant=quant)).name


def test_models_among_other_files() -> None:
    models = listed(
        "README.md",
        "M-Q4_K_M.gguf",
        "mmproj-M-f16.gguf",
        "M.imatrix.gguf",
        "Q8_0/M-Q8_0-00002-of-00002.gguf",
        "Q8_0/M-Q8_0-00001-of-00002.gguf",
        "M-Q5-00001-of-00003.gguf",
        "../evil.gguf",
    )
    assert [(model.name, [file.path for file in model.files]) for model in models] == [
        ("M-Q4_K_M", ["M-Q4_K_M.gguf"]),
        ("M-Q8_0", ["Q8_0/M-Q8_0-00001-of-00002.gguf", "Q8_0/M-Q8_0-00002-of-00002.gguf"]),
    ]
    assert models[1].size_bytes == 20
    assert models[1].source == "hf:o/r:Q8_0/M-Q8_0-00001-of-00002.gguf@abc"
    assert [file.path for file in models[0].projectors] == ["mmproj-M-f16.gguf"]


def test_choosing() -> None:
    models = listed(
        "M-Q4_K_M.gguf", "M-UD-Q4_K_M.gguf", "M-Q4_K_S.gguf", "M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00002-of-00002.gguf"
    )
    assert chosen(models) == "M-Q4_K_M"
    assert chosen(models, quant="q8_0") == "M-Q8_0"
    assert chosen(models, quant="UD-Q4_K_M") == "M-UD-Q4_K_M"
    assert chosen(models, quant="Q4_K_M") == "M-Q4_K_M"
    assert chosen(models, file="M-Q8_0-00002-of-00002.gguf") == "M-Q8_0"
    assert chosen(listed("only-this.gguf")) == "only-this"
    assert chosen(listed("gpt-oss-20b-MXFP4.gguf", "gpt-oss-20b-F16.gguf")) == "gpt-oss-20b-MXFP4"
    assert chosen(listed("a.Q4_K_M.gguf", "a.Q8_0.gguf"), quant="Q8_0") == "a.Q8_0"


@pytest.mark.parametrize(
    ("models", "ref", "code", "says"),
    [
        (listed("README.md"), {}, "source_not_found", "o/r holds no GGUF model"),
        (listed("a-Q4_K_M.gguf"), {"quant": "Q9"}, "source_not_found", "has no model Q9"),
        (listed("a-Q4_K_M.gguf"), {"file": "b.gguf"}, "source_not_found", "Name the file: a-Q4_K_M.gguf"),
        (listed("a-Q4_K_M.gguf", "b-Q4_K_M.gguf"), {}, "source_ambiguous", "any of 2 models"),
        (listed("a.gguf", "b.gguf"), {}, "source_ambiguous", "a.gguf, b.gguf"),
        (listed(*(f"m{i:02}.gguf" for i in range(20))), {}, "source_ambiguous", "and 8 more"),
    ],
)
def test_no_single_model(models: list[RemoteModel], ref: dict[str, str], code: str, says: str) -> None:
    with pytest.raises(MeshError) as caught:
        chosen(models, **ref)
    assert caught.value.code == code
    assert says in str(caught.value)
