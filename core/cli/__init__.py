"""The command line: thin functions that call the package and print what it returns."""
