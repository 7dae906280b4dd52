"""What every process stands on.

It has errors and exit codes, atomic files and locks, devices, signals, progress, and output for any
terminal.

Its central idea is that a failure is either something the user can fix, which is one line and an
exit code, or a bug with a traceback. It knows neither models nor data nor runs.
"""
