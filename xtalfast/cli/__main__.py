import sys

from xtalfast.cli import main

sys.exit(main())
