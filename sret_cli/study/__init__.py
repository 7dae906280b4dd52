"""Many runs: study files, rows, and the engine that does what is missing.

Its central idea is that the run directory is the truth: a study's table is what its directories
hold. It knows neither tables nor figures.
"""
