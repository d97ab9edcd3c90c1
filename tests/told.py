"""What a run tells, for tests that listen to all of it."""

import inspect
from collections.abc import Callable

from vlm_lora.training.events import Events

KINDS = [name for name, member in vars(Events).items() if inspect.isfunction(member)]


class Listener(Events):
    """Calls ``callback(kind, **values)`` for everything that happens."""

    def __init__(self, callback: Callable):
        self.callback = callback


def _telling(kind: str) -> Callable:
    signature = inspect.signature(getattr(Events, kind))

    def tell(self, *args, **values):
        given = signature.bind(self, *args, **values).arguments
        self.callback(kind, **{name: value for name, value in given.items() if name != "self"})

    return tell


for _kind in KINDS:
    setattr(Listener, _kind, _telling(_kind))


class Told(Listener):
    """Remembers what was told, and at a step does something."""

    def __init__(self, at: int = 0, do=lambda: None):
        super().__init__(self._remember)
        self.events, self.at, self.do = [], at, do

    def _remember(self, kind, **values):
        self.events.append((kind, values))
        if kind == "step" and values["step"] == self.at:
            self.do()

    def of(self, kind: str) -> list[dict]:
        return [values for told, values in self.events if told == kind]

    @property
    def warnings(self) -> list[str]:
        return [values["text"] for values in self.of("warning")]
