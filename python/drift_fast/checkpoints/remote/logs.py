"""Keep the signatures that URLs may carry out of what HTTP packages log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_own = threading.local()


@contextmanager
def hiding_queries() -> Iterator[None]:
    """Remove queries, which may hold signatures, from what HTTP packages log in this thread."""
    _own.hiding = True
    try:
        yield
    finally:
        _own.hiding = False


class _WithoutQueries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(_own, "hiding", False) and isinstance(record.args, tuple):
            record.args = tuple(
                str(argument).partition("?")[0] if "?" in str(argument) else argument
                for argument in record.args
            )
        return True


_WITHOUT_QUERIES = _WithoutQueries()


def install_filter() -> None:
    for name in ("urllib3.connectionpool", "httpx", "httpx2"):
        logging.getLogger(name).addFilter(_WITHOUT_QUERIES)
