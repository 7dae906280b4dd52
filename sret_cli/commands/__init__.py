"""The command line: from flags to specs, and from results to a terminal.

Its central idea is that a command lists its flags as parameters, calls a function of another
folder, and prints what that returns. `flags.py` holds the flags that several commands have, and
`app.main` is the one place that turns errors into messages and exit codes.
"""
