"""What the agent logs, as lines: for people, or as JSON; no secret is in either."""

import json
import logging
import sys

from lbproxy import secrecy
from lbproxy.config import config


class _Lines(logging.Formatter):
    """Lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        return secrecy.without(super().format(record))


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": secrecy.without(record.getMessage()),
        }
        if record.exc_info:
            said["traceback"] = secrecy.without(self.formatException(record.exc_info))
        return json.dumps(said)


def to_stderr(settings: config.Config) -> None:
    """Have all that is logged from now on written there, as the configuration says."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format is config.LogFormat.JSON:
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(_Lines("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    # At their own debug level these two say more than everything else together.
    for library in ("pyroute2", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.basicConfig(
        level=logging.DEBUG if settings.log_level >= 2 else logging.INFO, handlers=[handler], force=True
    )
