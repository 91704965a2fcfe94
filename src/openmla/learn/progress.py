"""What a learner has solved: one small file on their own machine, `env.state_dir() / "learn.json"`."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from openmla.core import env
from openmla.core.errors import ConfigError

_SCHEMA = 1


@dataclass
class Progress:
    """Attempts per exercise, and when each was first solved (UTC)."""

    attempts: dict[str, int] = field(default_factory=dict)
    solved: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, passed: bool) -> None:
        """One more attempt."""
        self.attempts[name] = self.attempts.get(name, 0) + 1
        if passed:
            self.solved.setdefault(name, datetime.now(UTC).isoformat(timespec="seconds"))


def path() -> Path:
    """The file; there after the first attempt."""
    return env.state_dir() / "learn.json"


def read() -> Progress:
    """What is there; nothing solved where there is no file. Raises ConfigError for a file that is something else."""
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        if found["schema"] != _SCHEMA:
            raise KeyError("schema")
        return Progress(dict(found["attempts"]), dict(found["solved"]))
    except FileNotFoundError:
        return Progress()
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{path()} is not a progress file of this version; move it away or delete it") from error


def write(progress: Progress) -> None:
    """Replace the file as a whole. Raises ConfigError where its folder cannot be written."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False, encoding="utf-8") as file:
            json.dump({"schema": _SCHEMA, **asdict(progress)}, file, indent=1)
        os.replace(file.name, path())
    except OSError as error:
        raise ConfigError(
            f"cannot write {path()}: {error.strerror}; set XDG_STATE_HOME to a folder of yours"
        ) from error
