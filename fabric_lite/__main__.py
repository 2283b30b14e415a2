"""``python -m fabric_lite`` is ``fabric-run``."""

import sys

from fabric_lite.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
