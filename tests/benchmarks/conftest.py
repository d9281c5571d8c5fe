"""Benchmarks are programs, and need packages that the tests do without: pytest leaves them alone."""

collect_ignore_glob = ["*.py"]
