"""Fetching a published preference model from the tab: its size first, then a job with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spo.preference.download import download, find_published
from spo.preference.pickles import in_half
from spo.webui import a1111, folders
from spo.webui.jobs.job import Job, start

if TYPE_CHECKING:
    from spo.preference.download import RemoteFile


def published() -> RemoteFile:
    """The published model for the loaded checkpoint, with its size. Offline, the SpoError says where to put it."""

    return find_published(a1111.loaded_checkpoint().architecture, folder=folders.preference_folder())


def start_fetching() -> Job:
    """Fetch it into models/SPO; generation goes on meanwhile. Raises SpoError."""
    remote = published()
    return start("download", remote.name, lambda job: _fetch(job, remote), queued=False)


def _fetch(job: Job, remote: RemoteFile) -> None:

    def progress(done: int, total: int) -> None:
        job.fraction = done / total
        job.message = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB."
        job.version += 1

    job.phase = "working"
    folder = folders.preference_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = download(remote, folder, progress=progress, should_stop=lambda: bool(job.stop_wanted))
    job.say(f"Writing {path.name} in half precision, too, for the GPU ...")
    in_half(path)
    job.say(f"{path.name} is in models/SPO; refresh the list of preference models and choose it.")
