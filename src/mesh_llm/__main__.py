"""`python -m mesh_llm`: the same as the `mesh-llm` command."""

from mesh_llm.cli.main import main

if __name__ == "__main__":
    main()
