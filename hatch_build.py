"""Builds the console's page into the wheel."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs tools/build_page.py before a wheel is made; an editable install gets its page by `make page`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, unless MESH_LLM_WITHOUT_PAGE is set: the wheel then has the plain page only."""
        if version == "editable" or os.environ.get("MESH_LLM_WITHOUT_PAGE"):
            return
        builder = _builder(Path(self.root))
        builder.build()
        built: Path = builder.BUILT
        for path in sorted(built.rglob("*")):
            if path.is_file() and path.name != builder.MARK:
                inside = path.relative_to(Path(self.root) / "src").as_posix()
                build_data["force_include"][str(path)] = inside


def _builder(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("build_page", root / "tools" / "build_page.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tools/build_page.py is missing: build the wheel from a checkout or the sdist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
