"""The shipped profiles (*.toml), and what reads them."""
