"""What is said where an RPC server cannot be confined."""

from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.confinement import launcher
from mesh_llm.engine.confinement.policy import RpcPolicy, why_refused
from mesh_llm.engine.spec import RpcWorkerSpec


async def test_the_reason_of_a_refusal_is_a_sentence_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(launcher, "has_seccomp", lambda: False)
    policy, spec = RpcPolicy(cache=tmp_path), RpcWorkerSpec(socket=tmp_path / "s")
    with pytest.raises(MeshError, match="Memory is not lent") as caught:
        await policy.command(("/bin/true",), {}, spec, launcher.CPU, ())
    refusal = f"{caught.value.message} {caught.value.hint}"
    assert why_refused(refusal) == "This system has no seccomp filters that mesh-llm can write."
