"""Where the command line begins: what can go wrong before its imports are done, and what a terminal may lack."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us, as cron may
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as we run
    try:
        from daemon_fast.cli import main as command

        command()
    except KeyboardInterrupt:  # later ones are told by the command itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
