"""`python -m biote`, the same as `biote`."""

import os
import sys

if __name__ == "__main__":
    if sys.path[0] in ("", os.getcwd()):  # a stranger's folder, perhaps: its json.py is not ours
        del sys.path[0]
    from .cli import main

    main()
