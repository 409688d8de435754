"""`python -m mpengine.apex SCRIPT ARGS...`."""

import sys

from mpengine.apex.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
