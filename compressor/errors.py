"""Everything this package raises on purpose.

CompressorError
├── UserError            the command or its input is at fault: exit code 2, one sentence
│   ├── RecipeError      a flag or recipe key has a value that cannot work
│   ├── ModelError       the model folder is missing, damaged, or of a kind that cannot be compressed
│   ├── DataError        the text is missing, empty, or in a shape nobody recognises
│   ├── OutputError      the output folder holds something else, or the disk is full
│   └── MissingExtra     an optional library is needed; the message names the pip extra
├── NumericError         non-finite numbers where none may be; names the layer
└── LostProcess          of several processes one is gone; names it

Messages say what is wrong, where, and what to do, in one sentence.
"""

LONGEST = 500  # characters of a message; what strangers' files made it say beyond that helps nobody


class CompressorError(Exception):
    """Base of all errors raised on purpose."""

    def __init__(self, message: str = ""):
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST - 103]} … {message[-100:]}")


class UserError(CompressorError):
    """The command or its input is at fault; the CLI prints the sentence and exits with 2."""


class RecipeError(UserError):
    """A flag or recipe key has a value that cannot work."""


class ModelError(UserError):
    """The model folder is missing, damaged, or of a kind that cannot be compressed."""


class DataError(UserError):
    """The text is missing, empty, or in a shape nobody recognises."""


class OutputError(UserError):
    """The output folder holds something else, or cannot be written."""


class MissingExtra(UserError):
    """An optional library is needed; the message names the pip extra."""


class NumericError(CompressorError):
    """Non-finite numbers where none may be; the message names the layer."""


class LostProcess(CompressorError):
    """One of several processes of a run is gone, and the others cannot go on without it; the message says which."""
