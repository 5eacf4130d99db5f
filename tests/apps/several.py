"""`python -m tests.apps.several`: kimi-lite several times in one process, which starts in a second. $COMMAND_LINES is
a JSON list of lists of arguments; SEPARATOR stands after what each of them shows.
"""

import json
import os
import sys
from contextlib import suppress

from kimi_lite import cli

SEPARATOR = "=" * 11

if __name__ == "__main__":
    for arguments in json.loads(os.environ["COMMAND_LINES"]):
        sys.argv = ["kimi-lite", *arguments]
        with suppress(SystemExit):
            cli.main()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, f"\n{SEPARATOR}\n".encode())
