"""The processes that answer together; usually one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Team(Protocol):
    """Several processes with the same model, each of which answers its share (`training.processes.Processes`)."""

    @property
    def index(self) -> int:
        """This process among all, from 0."""
        ...

    @property
    def count(self) -> int: ...

    @property
    def is_main(self) -> bool:
        """This is the one that writes."""
        ...

    def gather(self, part: T) -> list[T]:
        """Every process's ``part``, in their order."""
        ...

    def on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the main process, in all of them."""
        ...

    def require_same(self, what: dict[str, Any]) -> None:
        """An error unless all processes have the same."""
        ...

    def leave(self) -> None:
        """Part from the others; the last word to them."""
        ...


class Alone:
    """A team of one."""

    index, count, is_main = 0, 1, True

    def gather(self, part: T) -> list[T]:
        return [part]

    def on_main(self, work: Callable[[], T]) -> T:
        return work()

    def require_same(self, what: dict[str, Any]) -> None:
        pass

    def leave(self) -> None:
        pass


ALONE = Alone()


def share_of(team: Team, items: Sequence[T]) -> Sequence[T]:
    """This process's: one after the other they go round."""
    return items[team.index :: team.count]


def put_together(shares: Sequence[Sequence[T]]) -> list[T]:
    """What `share_of` took apart."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]
