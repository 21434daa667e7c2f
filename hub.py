"""Weights by name: owner/name, as openai-community/gpt2, downloaded once through huggingface_hub.

    locate("out/gpt")                       a path that exists stays what it is
    locate("openai-community/gpt2")         the folder in the cache of huggingface_hub
    locate("owner/name/weights.pth")        one file of a repository that holds several models

Only what a model here reads is downloaded: configs, vocabulary, and the weights in one format. After
an interruption only the files that are missing come. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured.
"""
import contextlib
import functools
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

SMALL = ("*.json", "*.jinja", "*.model", "*.bpe", "merges.txt", "rwkv_vocab_*.txt")
WEIGHTS = (                                 # the first of these formats that a folder has
    ("adapter_model.safetensors",), ("adapter_model.bin",),
    ("model.safetensors", "model-*-of-*.safetensors", "head.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    ("consolidated.*.pth",), ("ckpt.pt",), ("*.pth",))


def locate(path: str | Path, download: bool = True) -> Path:
    """A file or folder here as it is; what a name stands for, downloaded if it is not yet.

    download=False asks nobody: the path stays a missing one, unless it was downloaded before.
    OSError or ValueError of one line.
    """
    name, path = str(path).replace("\\", "/"), Path(path)
    if not is_name(name):
        return path
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        if not download:
            return path
        raise FileNotFoundError(
            f"{path}: there is no such file or folder here; if it is a model to be downloaded: "
            "python -m pip install huggingface_hub, then the same command again") from None
    owner, repository, *inside = name.split("/")
    found = fetch if download else earlier
    return found(f"{owner}/{repository}", "/".join(inside)) or path


def is_name(path: str) -> bool:
    """Whether a path may be owner/name[/inside]: not if its first folder is here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", path)
                and not Path(path.partition("/")[0]).exists())


@functools.cache
def fetch(name: str, inside: str) -> Path:
    """The local path of owner/name[/inside], downloaded where it is not yet."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        try:
            about = HfApi().model_info(name, files_metadata=True)
        except Exception as error:
            if is_network(error) and (found := earlier(name, inside)):
                print(f"download   {told_network(error)}: {name} as it was downloaded before",
                      file=sys.stderr)
                return found
            raise
        sizes = {file.rfilename: file.size or 0 for file in about.siblings or []}
        small, weights = wanted([*sizes], name, inside)
        folder = snapshots(name) / str(about.sha)
        for files in (small, weights):       # the weights only of a model that is read here
            missing = [file for file in files if not (folder / file).exists()]
            if missing and files is weights:
                check_space(sum(sizes[file] for file in missing), len(missing), name)
            if missing:
                snapshot_download(name, revision=about.sha, allow_patterns=missing)
            check_config(folder / inside)
        return folder / inside
    except KeyboardInterrupt:
        raise KeyboardInterrupt("files that are whole are kept: the same command fetches "
                                "the rest") from None
    except Exception as error:
        told = told_error(error, name)
        if told is None:
            raise
        raise OSError(told) from error


def snapshots(name: str) -> Path:
    """The folder in huggingface_hub's cache that has a folder for each revision of a repository."""
    from huggingface_hub import constants
    return Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"), "snapshots")


def earlier(name: str, inside: str) -> Path | None:
    """Where the last download lies, if there is one with weights; asks nobody."""
    folders = sorted(snapshots(name).glob("*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[-1:]:
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
        with contextlib.suppress(ValueError):
            wanted(files, name, inside)
            return folder / inside
    return None


def wanted(files: list[str], name: str, inside: str) -> tuple[list[str], list[str]]:
    """(configs and vocabulary, weights) of a repository's files that loading reads.

    inside: a folder of the repository, or one file of weights, beside which the others lie.
    """
    folder = PurePosixPath(inside).parent if inside in files else PurePosixPath(inside)
    here = [PurePosixPath(file) for file in files if PurePosixPath(file).parent == folder]
    small = [str(file) for file in here if any(fnmatch(file.name, kind) for kind in SMALL)]
    if inside in files:
        return small, [inside]
    for kinds in WEIGHTS:
        found = [str(file) for file in here if any(fnmatch(file.name, kind) for kind in kinds)]
        if found and found != ["head.safetensors"]:
            break
    else:
        held = ", ".join(file.name for file in here[:8]) or "nothing"
        raise ValueError(f"{name} has no weights that are read here, it holds {held}")
    if kinds == ("*.pth",) and found[1:]:
        raise ValueError(f"{name} holds several models, take one of them: "
                         + ", ".join(f"{name}/{file}" for file in found))
    return small, found


def check_config(folder: Path) -> None:
    """ValueError for a model that is not one of ours, before its weights are downloaded."""
    if (folder / "config.json").exists():
        from checkpoints import identify, readable      # here, as checkpoints imports this file
        with readable(folder):
            identify(folder)


def check_space(size: int, count: int, name: str) -> None:
    """Say what comes; ValueError if the disk has no room for it."""
    from huggingface_hub import constants
    cache = Path(constants.HF_HUB_CACHE)
    there = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(f"{name} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in "
                         f"{cache} (HF_HOME names another place)")
    print(f"download   {name}: {size / 1e9:.2f} GB in {count} file{'s' * (count != 1)}, to {cache}",
          file=sys.stderr)


def is_network(error: Exception) -> bool:
    """Whether nobody answered: huggingface_hub has had three HTTP libraries, each with its own
    exceptions."""
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError
    if isinstance(error, LocalEntryNotFoundError):
        return True
    library = type(error).__module__.partition(".")[0].rstrip("0123456789")
    return not isinstance(error, HfHubHTTPError) and (
        library in ("requests", "urllib", "httpx", "httpcore")
        or isinstance(error, (ConnectionError, TimeoutError)))


def told_network(error: Exception) -> str:
    """Who did not answer."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT} does not answer ({type(error).__name__})"


def told_error(error: Exception, name: str) -> str | None:
    """One line for what a hub answers and what to do; None for what is no answer of a hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    page, status = f"{constants.ENDPOINT}/{name}", getattr(getattr(error, "response", None),
                                                           "status_code", None)
    login = "`hf auth login`, or HF_TOKEN in the environment"
    if isinstance(error, GatedRepoError) and get_token() is None:
        return (f"{name} has a licence to be accepted, on {page}; then show who you are: {login}")
    if isinstance(error, GatedRepoError):
        return (f"{name} is not open to the account of your token: accept its licence on {page} "
                "(an answer may take hours)")
    if isinstance(error, RepositoryNotFoundError) and get_token() is None:
        return (f"{name}: no such file or folder here, and no model of this name on "
                f"{constants.ENDPOINT}; if it is a private one: {login}")
    if isinstance(error, RepositoryNotFoundError):
        return (f"{name}: no such file or folder here, and on {constants.ENDPOINT} no model of "
                "this name that the account of your token may see")
    if isinstance(error, HfHubHTTPError) and status == 401:
        return f"{name}: your token is not valid on {constants.ENDPOINT}: {login}"
    if isinstance(error, HfHubHTTPError):
        return f"{name}: {constants.ENDPOINT} answers {status or error}: try again later"
    if is_network(error):
        return (f"{name}: no such file or folder here, and {told_network(error)}; where there is a "
                "network, the same command fetches what is missing")
    return None
