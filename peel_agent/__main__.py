"""`python -m peel_agent`."""

import sys

from peel_agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
