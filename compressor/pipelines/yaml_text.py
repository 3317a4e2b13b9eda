"""YAML that strangers wrote, read with bounds: plain values, no merge keys, and whatever PyYAML raises is one kind of error.

PyYAML copies what a merge key (`<<`) names before anything can count it, so some hundred bytes of them fill the memory; nothing of ours writes any.
"""

from typing import Any

import yaml

from compressor import strict

VALUES = 10_000  # of a recipe or grid, aliases written out
MERGE = "tag:yaml.org,2002:merge"


class _Plain(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == MERGE for key, _ in node.value):
            raise ValueError("it merges mappings (<<): write the keys out")


def parse(text: str) -> Any:
    """The value of a YAML text; ValueError for what is none, has more than VALUES values, or merges mappings."""
    if text.count(",") + text.count("\n") + text.count(": ") > VALUES:  # PyYAML reads some ten thousand a second
        raise ValueError(f"it holds more than {VALUES} values")
    try:
        value = yaml.load(text, _Plain)  # a SafeLoader
    except RecursionError:
        raise ValueError(f"it nests deeper than {strict.DEEPEST} levels") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception:  # constructors raise what they like
        raise ValueError("it holds a value that is none of the type that its tag or its form tells") from None
    return strict.bounded(value, VALUES)
