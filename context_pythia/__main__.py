"""`python -m context_pythia` is the command `context-pythia`."""

import sys

from context_pythia.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
