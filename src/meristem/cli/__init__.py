"""The command line: one file per noun, each only calling the public API."""
