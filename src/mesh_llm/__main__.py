"""The `mesh-llm` command, and `python -m mesh_llm`."""

import signal


def main() -> None:
    """Run the command. While its modules are imported, Ctrl-C ends the process as it ends any other: silently."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mesh_llm.cli.main import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
