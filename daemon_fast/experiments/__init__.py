"""The demo and the paper's experiments: what `daemon-fast demo` and `daemon-fast evaluate` do."""
