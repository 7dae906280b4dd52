"""What every process stands on.

It has errors and exit codes, files that are written whole or not at all, devices, signals, progress
and the output of any terminal.

Its central idea is that a failure is either the user's to fix, and then one line with an exit code,
or a bug. It knows neither models nor data nor runs.
"""
