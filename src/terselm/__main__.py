"""``python -m terselm``."""

from __future__ import annotations

from terselm.cli import main

if __name__ == "__main__":
    main()
