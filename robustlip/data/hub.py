"""Data of the hub, through the `datasets` library, with a short time limit if there is no network.

The HTTP client's own cache is used: HF_HOME is its folder, and HF_HUB_OFFLINE=1 uses only the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from robustlip.data.folders import ENVIRONMENT
from robustlip.errors import BadInput, DataUnavailable

HUB_NAMES = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "tiny_shakespeare": "karpathy/tiny_shakespeare",
}
PATIENCE = 10.0  # seconds for the one request that checks whether the hub answers

# The branch in which the hub keeps parquet copies of repositories with a loading script; `datasets` no longer runs such scripts.
_CONVERTED = "refs/convert/parquet"


def from_hub(name: str, split: str | None, subset: str | None = None) -> Any:
    """The `datasets.Dataset` of the hub's data set `name` (for split=None a dict of them). subset: the configuration; None for the only one.

    Raises DataUnavailable if the hub does not answer within PATIENCE seconds, or if offline mode is on and the cache
    has no copy; BadInput if the hub has no such data set or split.
    """
    repository = HUB_NAMES.get(name, name)
    from datasets import load_dataset

    offline = _ask(repository, name)
    chosen = {} if subset is None else {"name": subset}
    try:
        with quiet():
            try:
                return load_dataset(repository, split=split, **chosen)
            except RuntimeError as error:
                if "script" not in str(error):
                    raise
                return load_dataset(repository, split=split, revision=_CONVERTED, **chosen)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        if "onfig" in reason:
            raise BadInput(f"expected the name of a configuration of {repository}, got {subset!r} ({reason}); name one with --subset") from None
        if offline and "split" not in reason:
            raise _unavailable(name, "offline mode with no copy in the hub's cache") from None
        raise BadInput(f"expected a split that {repository} has, got {split!r} ({reason}); name another, or a parquet file") from None
    except (OSError, RuntimeError) as error:
        got = "offline mode with no copy in the hub's cache" if offline else f"a failed download ({type(error).__name__})"
        raise _unavailable(name, got) from None


def stream_from_hub(name: str, subset: str | None, split: str) -> Any:
    """A `datasets.IterableDataset` of one split of the hub's data set `name`, which is downloaded as it is read.

    subset: the configuration, e.g. 'sample-10BT'; None for the only one. Raises as `from_hub` does.
    """
    repository = HUB_NAMES.get(name, name)
    from datasets import load_dataset

    offline = _ask(repository, name)
    try:
        with quiet():
            return load_dataset(repository, subset, split=split, streaming=True)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise BadInput(f"expected a subset and a split that {repository} has, got {subset!r} and {split!r} ({reason}); name others") from None
    except (OSError, RuntimeError) as error:
        got = "offline mode with no copy in the hub's cache" if offline else f"no answer when it was opened ({type(error).__name__})"
        raise _unavailable(name, got) from None


def _ask(repository: str, name: str) -> bool:
    """Whether offline mode is on; otherwise checks that the hub has the repository. Raises DataUnavailable and BadInput as `from_hub` does."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if config.HF_HUB_OFFLINE:
        return True
    try:
        # Checked first, because load_dataset retries an unreachable host for half a minute.
        _within(PATIENCE, lambda: HfApi().dataset_info(repository, timeout=PATIENCE))
    except (RepositoryNotFoundError, GatedRepoError):
        raise BadInput(f"expected a public data set on the hub, got {repository!r}, which is not visible; correct the name or log in") from None
    except Exception as error:  # the HTTP client, and so its errors, differ between versions of huggingface_hub
        raise _unavailable(name, f"no answer from the hub ({type(error).__name__})") from None
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Disables the progress bars and warnings of `datasets` inside the block, and restores its settings."""
    import datasets
    from datasets.utils import logging

    bars, level = datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _within(seconds: float, call: Any) -> None:
    """Runs call() with a time limit; raises its exception, or TimeoutError. It runs in a thread, because name resolution has no time limit."""
    raised: list[BaseException] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:  # raised again by the caller
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if raised:
        raise raised[0]


def _unavailable(name: str, got: str) -> DataUnavailable:
    return DataUnavailable(
        f"expected the data set {name!r} in a local folder or on the hub, got no local copy and {got}; "
        f"connect to the network, or name a folder that contains it with --data-dir or {ENVIRONMENT}"
    )
