"""The errors that Diptych raises on purpose.

Every message says what was wrong, with which file, and what to do, in one sentence that can be shown to a person.
A wrong argument (a negative scale, an unknown mode) is a plain `ValueError`, as everywhere in Python; the command
line shows it in the same way and leaves with status 2. This module imports nothing.
"""


class DiptychError(Exception):
    """Base class: something that a person can understand and often mend went wrong."""


class CheckpointError(DiptychError):
    """A file or folder of weights or of training state cannot be used: damaged, truncated, unsafe or misshapen."""


class UnknownArchitecture(DiptychError):
    """The weights are readable, but no known network fits them."""


class ImageError(DiptychError):
    """A picture cannot be read, written or worked on."""


class ModelNotFound(DiptychError):
    """No model, network or file goes by this name."""


class OutOfMemory(DiptychError):
    """The device ran out of memory even for the smallest piece of work."""


class Cancelled(DiptychError):
    """The work was stopped on request before it was complete."""
