"""Files, processes and locks of this host, as the drivers and the engine need to see them."""
