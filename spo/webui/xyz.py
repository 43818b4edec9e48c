"""placeholder"""


def add_axes() -> None: ...
