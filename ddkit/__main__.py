"""`python -m ddkit` is the command `ddkit`."""

from __future__ import annotations

from ddkit.cli import main

if __name__ == "__main__":
    main()
