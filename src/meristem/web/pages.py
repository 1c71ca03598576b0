"""What every page shares: templates with escaping, the one script and its digest, and writing the file."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from meristem._version import __version__
from meristem.errors import BadInput
from meristem.store.files import disk_failure, write_file_durably
from meristem.web import charts, wording
from meristem.web.report_data import short

# Printing shows what is folded away; without JavaScript the page only stays as folded as it is.
SCRIPT = (
    "addEventListener('beforeprint',()=>{for(const d of document.querySelectorAll('details'))d.open=true})"
)


def render_page(template: str, **values: Any) -> str:
    """A page as text: everything in it is escaped, and it loads nothing."""
    environment = Environment(
        loader=PackageLoader("meristem.web", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals.update(
        charts=charts,
        wording=wording,
        short=short,
        tool=__version__,
        script=SCRIPT,
        script_digest=b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )
    return environment.get_template(template).render(values)


def write_text(text: str, path: Path) -> Path:
    """A reader sees the old file or the whole new one. Raises ``BadInput`` when ``path`` is a folder and
    ``EnvironmentFailure`` when the file cannot be written."""
    if path.is_dir():
        raise BadInput.at(path, None, "a folder; name a file in it")
    if path.exists() and not path.is_file():  # a pipe or a device is written through
        try:
            path.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise disk_failure(error, path) from error
    else:
        write_file_durably(path.resolve() if path.is_symlink() else path, text.encode())
    return path
