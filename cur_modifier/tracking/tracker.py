"""The interface through which the modifiers record what they do, and its do-nothing form."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from loguru import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Tracker(ABC):
    """Records one compression.

    No method raises or waits for a server, except ``finish``, which waits for a bounded time: a
    compression never fails, and is never slowed, because its record could not be written.

    Attributes:
        run_id: the MLflow run that is written, ``None`` where nothing is recorded.
    """

    run_id: str | None

    @abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested mappings and lists become dotted keys (see ``flatten``).

        A key or value beyond MLflow's limits is cut, visibly, so log the full recipe with
        ``log_text``. MLflow lets no parameter change: where the run has another value already, that
        value stays and a warning names the key.
        """

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Record numbers, at ``step`` (0 if None). NaN and infinity are dropped with a warning."""

    @abstractmethod
    def log_text(self, text: str, artifact: str) -> None:
        """Record ``text`` as the file ``artifact`` (UTF-8; ``/`` separates folders).

        This holds for every artifact: a file that the run has already, say from an earlier
        compression in the same run, is kept, and the new one is numbered (``layers_2.csv``).
        """

    @abstractmethod
    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact: str) -> None:
        """Record ``rows`` as the CSV file ``artifact`` and as the MLflow table ``*.json``.

        The columns are the keys of all rows in order of appearance. No rows, no files.
        """

    @abstractmethod
    def log_figure(self, figure: Figure, artifact: str) -> None:
        """Record ``figure`` as the PNG file ``artifact``; it is drawn before the call returns."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run; keys and values are cut as those of ``log_params`` are."""

    @abstractmethod
    def finish(self, *, error: BaseException | str | None = None) -> None:
        """Write what is left and end the run: FINISHED, or FAILED with the tag ``error``.

        A run that the user had started is left running. The second call does nothing.
        """


_T = TypeVar("_T", bound=Tracker)
_P = ParamSpec("_P")


def never_raises(
    method: Callable[Concatenate[_T, _P], None],
) -> Callable[Concatenate[_T, _P], None]:
    """What cannot be prepared (a figure that cannot be drawn) is left out with a warning."""

    @functools.wraps(method)
    def guarded(self: _T, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            logger.warning(
                f"MLflow: {method.__name__} leaves something out of run {self.run_id}: "
                f"{type(error).__name__}: {error}"
            )

    return guarded


class NullTracker(Tracker):
    """Records nothing."""

    run_id = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        pass

    def log_text(self, text: str, artifact: str) -> None:
        pass

    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact: str) -> None:
        pass

    def log_figure(self, figure: Figure, artifact: str) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def finish(self, *, error: BaseException | str | None = None) -> None:
        pass
