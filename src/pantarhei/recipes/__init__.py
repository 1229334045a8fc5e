"""One file a system: how data, network, path and loop are put together."""
