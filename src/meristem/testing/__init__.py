"""Contract suites for whoever writes a back end: subclass one, give it the fixture that it asks for, run pytest."""
