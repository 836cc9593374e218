"""What the commands share: how their words are parsed."""

import argparse
from typing import NoReturn

from typing_extensions import override


class Parser(argparse.ArgumentParser):
    """Parser whose errors are ``ValueError``, so that ``run_command`` makes one line of them."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
