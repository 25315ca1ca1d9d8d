"""Builds the console's page and the engine's RPC plugin into the wheel."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

_BUNDLED = "mesh_llm/engine/bundled"
"""Where a node looks for the plugin in its own package (mesh_llm/engine/installation.py)."""


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs tools/build_page.py and tools/build_plugin.py before a wheel is made.

    An editable install gets its page by `make page`, and its plugin by `make setup`.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build both. MESH_LLM_WITHOUT_PAGE and MESH_LLM_WITHOUT_PLUGIN leave one out.

        A wheel without the page has the plain page only. A wheel without the plugin is for all systems, and its nodes
        build the plugin themselves.
        """
        if version == "editable":
            return
        root = Path(self.root)
        if not os.environ.get("MESH_LLM_WITHOUT_PAGE"):
            builder = _builder(root)
            builder.build()
            built: Path = builder.BUILT
            for path in sorted(built.rglob("*")):
                if path.is_file() and path.name != builder.MARK:
                    inside = path.relative_to(root / "src").as_posix()
                    build_data["force_include"][str(path)] = inside
        if not os.environ.get("MESH_LLM_WITHOUT_PLUGIN"):
            plugin = _plugin(root)
            for path in plugin:
                build_data["force_include"][str(path)] = f"{_BUNDLED}/{path.name}"
            if plugin:
                # It fits this system and processor, and every Python. It may need this system's C library or a newer.
                build_data["pure_python"] = False
                tags = list(platform_tags())
                build_data["tag"] = f"py3-none-{next((tag for tag in tags if 'manylinux' in tag), tags[0])}"


def _plugin(root: Path) -> list[Path]:
    """Build the plugin; returns its files, none where it cannot be built. The builder prints the reason."""
    directory = root / "build" / "bundled"
    shutil.rmtree(directory, ignore_errors=True)
    path = os.pathsep.join([str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [sys.executable, str(root / "tools" / "build_plugin.py"), "--bundle", str(directory)]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, check=False)
    if done.returncode != 0:
        print("The wheel is made without the RPC plugin: its nodes build it themselves.", file=sys.stderr)
        return []
    return [file for file in sorted(directory.iterdir()) if file.is_file() and not file.name.startswith(".")]


def _builder(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("build_page", root / "tools" / "build_page.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tools/build_page.py is missing: build the wheel from a checkout or the sdist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
