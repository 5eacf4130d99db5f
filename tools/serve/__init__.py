"""Tools around the server: an engine that follows a script, agents driven on it, load, throughput."""
