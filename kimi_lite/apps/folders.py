"""Where the program keeps what is the user's: conversations and history (state).

They are for their owner alone: folders get mode 0700 and files 0600.
"""

import os
from pathlib import Path

from platformdirs import user_state_path

from kimi_lite.errors import KimiLiteError
from kimi_lite.files import whole_file


def state_folder() -> Path:
    """$KIMI_LITE_STATE, or the platform's state folder for kimi-lite (XDG_STATE_HOME counts)."""
    chosen = os.environ.get("KIMI_LITE_STATE")
    return Path(chosen).expanduser() if chosen else user_state_path("kimi-lite")


def make_private(folder: Path, is_ours: bool = False) -> Path:
    """Create `folder` and what is missing above it for this user alone; one that `is_ours` is closed to others where it
    exists, too. KimiLiteError where that is impossible."""
    try:
        if not folder.is_dir():
            for missing in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)  # says what is wrong where something else has the name
        elif is_ours and folder.stat().st_mode & 0o077 and folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
    except OSError as error:
        raise KimiLiteError(
            f"The folder {folder} cannot be made: {error.strerror}.", "Name another one in KIMI_LITE_STATE."
        ) from error
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file whole, readable by this user alone. Killed meanwhile, it leaves the old file or the new one."""
    with whole_file(path, permissions=0o600) as file:
        file.write(text)
