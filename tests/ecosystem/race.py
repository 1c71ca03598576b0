"""One process of a race: moves the champion of ``base`` in every round, always from the revision it is told.

Reads ``revision version`` lines from stdin, answers each with ``won`` or ``lost MESSAGE``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from meristem.ecosystem import aliases
from meristem.errors import StateMoved
from meristem.store.store import Store

store = Store(Path(sys.argv[1]))
store.database.check_schema()
print("ready", flush=True)
for line in sys.stdin:
    revision, version = line.split()
    try:
        with store.transaction(sys.argv[2]) as tx:
            aliases.move(tx, "base", aliases.CHAMPION, version, int(revision))
        print("won", flush=True)
    except StateMoved as error:
        print(f"lost {error}", flush=True)
