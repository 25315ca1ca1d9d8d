"""Writes the tables of all options into docs/configuration.md: `python tools/config_docs.py --write`.

Without `--write` it prints them. A test compares the page with the program.
"""

import sys
from pathlib import Path

from mesh_llm.cli.config_text import options_table

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- options -->\n", "<!-- end of options -->\n"


def page() -> str:
    """The page with the tables of this program."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{options_table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(options_table())
