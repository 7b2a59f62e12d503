"""A base of objects that are defined by their class and configuration."""

from typing import Any, Self


class Configurable:
    """Serialises with Keras, compares and prints by configuration.

    A subclass whose constructor takes arguments must override `get_config`. To
    be saved, it must be registered with
    `@keras.saving.register_keras_serializable()`.
    """

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Creates an object from the result of `get_config`."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        arguments = (f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({', '.join(arguments)})"
