"""Audit a model over a data set: what does it look at, how exact is that, where does it go wrong?

`audit` explains every image of a source and keeps the results in Parquet; it needs
``captum-scoremap[audit]``. The order of the rooms: sources and plan (which images, in which shards), worker
(a shard's tables), shards (tables on disk), run.
"""

from captum_scoremap.data.extras import import_extra

import_extra("pyarrow", "audit")
import_extra("jinja2", "audit")

from captum_scoremap.audit.run import Audit, audit  # noqa: E402  # what it needs is looked for first
from captum_scoremap.audit.schema import TABLES, describe  # noqa: E402
from captum_scoremap.data.sources import Source, open_source  # noqa: E402

__all__ = ["TABLES", "Audit", "Source", "audit", "describe", "open_source"]
