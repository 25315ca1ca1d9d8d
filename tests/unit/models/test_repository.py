import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.source_ref import RemoteModel, RepositoryFile, SourceRef, choose, models_in


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
        (listed("a-Q4_K_M.gguf"), {"file": "b.gguf"}, "source_not_found", "Give the file: a-Q4_K_M.gguf"),
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
