"""`python -m cascade`: the command line."""

import sys

from cascade.cli import main

if __name__ == "__main__":
    sys.exit(main())
