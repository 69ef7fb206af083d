"""Arguments of networks, which stay the plain values that they are."""

from typing import TYPE_CHECKING, Any, TypeAlias

# jsonargparse imports what stands under "class_path" wherever a type says Any, which a file of
# somebody else could make use of. In a mapping without types everything stays what it is.
if TYPE_CHECKING:
    Arguments: TypeAlias = dict[str, Any]
else:
    Arguments = dict
