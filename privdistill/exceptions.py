"""Errors raised by privdistill.

The tree::

    PrivDistillError
    ├── LayerNotFoundError   (ValueError)    a tap names no layer, or no bottleneck can be told
    ├── ShapeMismatchError   (ValueError)    two tensors that must fit each other do not
    ├── ModalityError        (ValueError)    the input does not carry the modalities named
    ├── ObjectiveError       (ValueError)    an option, a target or an objective that has no meaning
    ├── CacheError           (ValueError)    a cache folder or key that cannot be used
    └── LifecycleError       (RuntimeError)  a call at the wrong time, or a capture missing

    CacheWarning             (UserWarning)   an entry that was lost; training goes on

Every message says what ran, what arrived, what fits and what to do.
"""


class PrivDistillError(Exception):
    """Base of every error this library raises on purpose."""


class LayerNotFoundError(PrivDistillError, ValueError):
    """A tap names no layer of the network, or the bottleneck could not be located."""


class ShapeMismatchError(PrivDistillError, ValueError):
    """Two tensors whose shapes must agree do not."""


class ModalityError(PrivDistillError, ValueError):
    """The input does not carry the modalities that were named for it."""


class ObjectiveError(PrivDistillError, ValueError):
    """An option, a target or an objective that has no meaning."""


class LifecycleError(PrivDistillError, RuntimeError):
    """A call at the wrong time, or a tap that recorded nothing when it had to."""


class CacheError(PrivDistillError, ValueError):
    """A cache folder, an option or a key that cannot be used."""


class CacheWarning(UserWarning):
    """An entry of a cache could not be kept or read; training goes on without it."""
