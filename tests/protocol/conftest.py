"""Property tests give the same examples every time, and no example races a clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("lumaris", deadline=None, derandomize=True)
settings.load_profile("lumaris")
