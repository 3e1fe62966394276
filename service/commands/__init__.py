"""The verbs of the command line; each imports what it needs when it runs, so that `tenet --help` is quick."""
