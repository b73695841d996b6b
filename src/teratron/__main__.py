"""`python -m teratron` is the `teratron` command."""

import sys

from teratron.cli.main import main

sys.exit(main())
