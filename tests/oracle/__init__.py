"""Whether what the firewall accepts is safe: accepted graphs are computed by a sanitised build of the pinned engine."""
