"""One check a file; each takes what it judges and returns `CheckResult` lines, never a bool."""
