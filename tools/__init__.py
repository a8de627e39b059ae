"""What `make` and the tests need besides the package itself."""
