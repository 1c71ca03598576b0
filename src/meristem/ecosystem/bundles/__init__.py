"""Bundles: one version with all that it needs, and its evidence, to be carried to another workspace.

::

    PLACE/bundle.json       what the bundle is: written last, so a push that was cut off is no bundle
    PLACE/documents.jsonl   canonical documents, one a line, each after those that it names
    PLACE/evidence.jsonl    events of the pushing workspace about them, verbatim, and the documents these are about
    PLACE/packs/            blobs, in packs as in a store

A place is a folder or any fsspec URL (``s3://bucket/prefix``). Nothing in a bundle depends on when, where or by whom it
was pushed: the same version out of the same state is the same bytes.
"""

from meristem.ecosystem.bundles.arrive import Pulled, pull
from meristem.ecosystem.bundles.push import Pushed, push

__all__ = ["Pulled", "Pushed", "pull", "push"]
