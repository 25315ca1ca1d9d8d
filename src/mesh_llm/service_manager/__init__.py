"""How does systemd or launchd run a node? Its unit, the commands that install it, and what the node reports to it."""
