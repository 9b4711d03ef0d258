"""How long work tells how far it is; the command line alone decides whether anything is drawn."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, description) as work advances, the last time with done == total."""
