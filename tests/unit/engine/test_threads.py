from pathlib import Path

from mesh_llm.engine.cpu import threads_for, with_threads
from mesh_llm.engine.spec import EngineSpec


def test_small_models_get_few_threads(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"x")
    assert threads_for(model, cores=8) == 1
    with model.open("r+b") as file:
        file.truncate(100 * 2**20)
    assert threads_for(model, cores=8) == 4
    assert threads_for(model, cores=4) is None
    assert threads_for(tmp_path / "missing.gguf", cores=8) is None


def test_all_parts_of_a_model_count(tmp_path: Path) -> None:
    first = tmp_path / "big-00001-of-00002.gguf"
    first.write_bytes(b"metadata")
    assert threads_for(first, cores=8) is None
    with (tmp_path / "big-00002-of-00002.gguf").open("wb") as file:
        file.truncate(40 * 2**20)
    assert threads_for(first, cores=8) == 2


def test_the_users_choice_stays(tmp_path: Path) -> None:
    spec = EngineSpec(model=tmp_path / "m.gguf", alias="m", context=1, slots=1, threads=7)
    assert with_threads(spec).threads == 7
