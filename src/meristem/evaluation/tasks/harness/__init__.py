"""Tasks of other people's harnesses as suite tasks: lm-evaluation-harness and Inspect. See ``docs/harnesses.md``."""
