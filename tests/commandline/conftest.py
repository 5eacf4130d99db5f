"""Settings are not the user's own."""

from tests.apps.conftest import _own_folders as _own_folders
