from __future__ import annotations


def pytest_configure(config):
    config.addinivalue_line("markers", "strace: needs strace and the right to trace")
