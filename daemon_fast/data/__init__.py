"""Human texts, files of records, and candidates kept on disk."""

from daemon_fast.data.texts import Pairs, read_texts, split

__all__ = ["Pairs", "read_texts", "split"]
