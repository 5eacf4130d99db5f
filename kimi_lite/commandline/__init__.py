"""From what is typed and configured to `Options`. Read at every start, so nothing heavy is imported here."""
