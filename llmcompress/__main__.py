"""``python -m llmcompress``."""

import sys

from llmcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
