"""The staged Medusa engine: everything that is not the terminal."""
