"""A plug-in that is broken."""

raise RuntimeError("no such device")
