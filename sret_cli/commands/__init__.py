"""The command line: flags to specs, and results to a terminal.

Its central idea is that a command says what it takes, calls one function, and prints what that
returns. The one place that turns errors into messages and exit codes is `app.main`.
"""
