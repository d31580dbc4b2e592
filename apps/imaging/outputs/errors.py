"""What can go wrong while outputs are written."""


class OutputError(Exception):
    """An output could not be written.

    Its message names case, kind and cause by type alone: the words of a library may quote
    what stands in a header.
    """
