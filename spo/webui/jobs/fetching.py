"""Downloading a published preference model, beside whatever else goes on: it touches no checkpoint."""

from __future__ import annotations

import threading

from spo.errors import SpoError
from spo.files import size_text
from spo.preference.download import download, find_published
from spo.preference.pickles import in_half
from spo.webui import folders
from spo.webui.jobs.job import BusyError, Job, run
from spo.webui.seam import webui

_lock = threading.Lock()
_current: Job | None = None
_thread: threading.Thread | None = None


def current() -> Job | None:
    """The download that goes on, or the last one."""
    return _current


def start_fetching() -> Job:
    """Fetch the published model for the loaded checkpoint into models/SPO; returns at once. SpoError if one goes on."""
    global _current, _thread
    architecture = webui.glance().architecture
    if not architecture:
        raise SpoError("No checkpoint is loaded; choose one at the top of the page.")
    with _lock:
        if _thread is not None and _thread.is_alive():
            assert _current is not None
            raise BusyError(f"{_current.name} is being downloaded already.")
        job = _current = Job("download", f"preference model for {architecture}", "download")
        job.message = "Asking huggingface.co ..."
        _thread = threading.Thread(
            target=run, args=(job, lambda job: _fetch(job, architecture)), name="spo download", daemon=True
        )
        _thread.start()
    return job


def stop() -> None:
    """End the download; it goes on from there the next time. SpoError when none goes on."""
    if _current is None or not _current.live:
        raise SpoError("Nothing is being downloaded.")
    _current.stop_wanted = "save"
    _current.say("Stopping ...")


def end(timeout_s: float = 60.0) -> None:
    """Stop the download and wait for its thread: for Reload UI."""
    if _thread is not None and _thread.is_alive() and _current is not None:
        _current.stop_wanted = "save"
        _thread.join(timeout_s)


def _fetch(job: Job, architecture: str) -> None:
    folder = folders.preference_folder()
    remote = find_published(architecture, folder=folder)
    job.name = remote.name

    def progress(done: int, total: int) -> None:
        job.fraction = done / total
        job.message = f"{size_text(done)} of {size_text(total)}."
        job.version += 1

    job.phase = "working"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = download(remote, folder, progress=progress, should_stop=lambda: bool(job.stop_wanted))
    except SpoError as error:
        if not job.stop_wanted:
            raise
        job.phase = "stopped"
        return job.say(str(error))
    job.say(f"Writing {path.name} in half precision, too, for the GPU ...")
    in_half(path)
    job.say(f"{path.name} is in models/SPO, and in the list of preference models.")
