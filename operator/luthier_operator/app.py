"""The operator as a process: its tasks, the order in which they start, and how they stop.

`jobs` and `watch` fill the `store`, which names the affected keys; `queue` passes them to `reconcile`; `progress` reads
metrics of pods, `events` posts events, `health` serves probes and metrics, `election` chooses the leader. A watch that
ends is restarted. Only a signal or the loss of the Lease ends the operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvloop

from luthier_api import status
from luthier_api.base import ApiModel, model_in
from luthier_api.kinds import KINDS
from luthier_api.run import RUNS
from luthier_api.termination import TerminationMessage
from luthier_operator import health, settling
from luthier_operator.client import RESOURCES, VERSION, ApiError, Client, Resource
from luthier_operator.client import login as client_login
from luthier_operator.election import Election
from luthier_operator.events import Recorder
from luthier_operator.jobs import Login, login, watch_jobs
from luthier_operator.kueue import WORKLOAD
from luthier_operator.metrics import LEADS, Metrics
from luthier_operator.model import Key, Object
from luthier_operator.ownership import owner_of
from luthier_operator.progress import Scraper, pod_url
from luthier_operator.queue import BACKOFF_BASE, Queue
from luthier_operator.reconcile import Reconciler
from luthier_operator.settings import Settings
from luthier_operator.store import Store
from luthier_operator.watch import Watch

log = logging.getLogger(__name__)

# By default Python looks for cycles after 700 new objects, and one chunk of a list has 30,000: that took half of a
# start with 1,000 jobs.
GC_THRESHOLDS = (100_000, 50, 100)
JOBSET = "JobSet"
JOBS = ("FineTuneJob", "GenerateJob")
CHILDREN = (("Job", "Pod"), (JOBSET,), (WORKLOAD,))
GROUPS: tuple[tuple[str, ...], ...] = (JOBS, *CHILDREN)
"""Kinds that are installed together. Each group is watched separately, so that a missing one does not delay the others.
"""


@dataclass(frozen=True)
class Pace:
    """Intervals of the operator in seconds."""

    relist: float = 600  # between two periodic lists
    settle: float = 5  # from the end of a list by kopf to one that finds what was deleted between two watches
    discovery: float = 20  # between two checks whether a missing CRD is installed
    restart: float = 2  # from the end of a watch to its restart
    backoff: float = BACKOFF_BASE
    flush: float = 2  # for events, when the operator stops


class Operator:
    def __init__(
        self,
        settings: Settings,
        client: Client,
        metrics: Metrics,
        login: Login = login,
        pace: Pace = Pace(),
        url: Callable[[Object], str] = pod_url,
        signals: bool = True,
        election: Election | None = None,
    ) -> None:
        """`url` maps a running pod to the address of its metrics. `signals`: whether SIGTERM and SIGINT end the
        operator. Without an `election` it is the only replica.
        """
        self.settings, self._client, self._metrics, self._login, self._pace = settings, client, metrics, login, pace
        self.store = Store()
        self.queue = Queue(
            backoff=pace.backoff, observer=metrics, is_needed=lambda key: self._reconciler.is_needed(key)
        )
        self._events = Recorder(client, metrics)
        self._reconciler = Reconciler(self.store, client, self.queue, self._events, metrics, settings)
        self._scraper = Scraper(self.store, self.queue.add, metrics, settings.progress_every, url)
        self._signals, self._election = signals, election
        self._namespaces: Sequence[str | None] = settings.namespaces or (None,)
        self._unlisted = set(GROUPS)
        self.ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._parts: list[asyncio.Task[None]] = []

    def stop(self) -> None:
        self._stop.set()

    async def serve(self) -> None:
        """Work until `stop`, SIGTERM or SIGINT. Raises LeaseLost."""
        self._take_signals()
        if self._election and not await self._elected(self._election):
            return
        log.info("luthier %s watches %s", VERSION, ", ".join(self.settings.namespaces) or "all namespaces")
        posting = asyncio.create_task(self._events.serve(), name="events")
        self._parts = [posting]
        self._parts += [asyncio.create_task(self._follow(group), name=f"watch {group[0]}") for group in GROUPS]
        self._parts += [
            asyncio.create_task(self._work(), name="workers"),
            asyncio.create_task(self._scraper.serve(), name="progress"),
        ]
        # Until the very end, also while the last reconciles finish. If the Lease is lost, the process ends at once.
        holding = [asyncio.create_task(self._election.hold(), name="lease")] if self._election else []
        self._parts += holding
        stopping = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([stopping, *self._parts], return_when=asyncio.FIRST_COMPLETED)
            for part in done - {stopping}:
                log.error("%s has ended: %r", part.get_name(), part.exception())
        finally:
            self._stop.set()
            stopping.cancel()
            ending = [p for p in self._parts if p not in (posting, *holding)]
            for part in ending:
                part.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            await self._events.flush(self._pace.flush)
            for part in (posting, *holding):
                part.cancel()
            await asyncio.gather(posting, *holding, return_exceptions=True)
            if self._election:
                await self._election.leave()
        for part in done - {stopping}:
            part.result()

    def alive(self) -> bool:
        """Whether no task has ended."""
        return not any(part.done() for part in self._parts)

    def serving(self) -> bool:
        """Whether it knows all jobs, or stands by while another replica is the leader."""
        return self.ready.is_set() or bool(self._election and self._election.follows)

    def metrics_text(self) -> bytes:
        return self._metrics.text(self.store.states())

    # Parts

    async def _elected(self, election: Election) -> bool:
        """Stand by until this replica is the leader. False if it is stopped before."""
        log.info("luthier %s stands by for the Lease %s", VERSION, election.lease)
        self._metrics.set(LEADS, 0, election.lease)
        winning, stopping = asyncio.create_task(election.win()), asyncio.create_task(self._stop.wait())
        await asyncio.wait([winning, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in (winning, stopping):
            task.cancel()
        await asyncio.gather(winning, stopping, return_exceptions=True)
        if winning.cancelled():
            await election.leave()
            return False
        winning.result()
        self._metrics.set(LEADS, 1, election.lease)
        return True

    async def _work(self) -> None:
        # Before the first lists are complete, existing children would be created again.
        await self.ready.wait()
        log.info("ready: %d jobs", len(self.store.keys()))
        await self.queue.serve(self._reconciler.work, self.settings.workers)

    async def _follow(self, group: Sequence[str]) -> None:
        """Keep the kinds of `group` up to date in the store: wait until they exist, list, watch, list periodically."""
        resources = [RESOURCES[kind] for kind in group]
        watches = [self._watch_of(resource, namespace) for resource in resources for namespace in self._namespaces]
        # Not `while True`: a task group that is cancelled while one of its tasks fails raises only the failure.
        while not self._stop.is_set():
            try:
                await self._until_installed(resources)
                if group == JOBS:
                    await self._serve_jobs(resources, watches)
                else:
                    await self._serve_children(group, watches)
            except* Exception as errors:
                log.warning(
                    "watch of %s: restart in %g s: %s",
                    ", ".join(group),
                    self._pace.restart,
                    "; ".join(map(repr, errors.exceptions)),
                )
            await asyncio.sleep(self._pace.restart)

    def _watch_of(self, resource: Resource, namespace: str | None) -> Watch:
        touched = self._enqueue if resource.kind in KINDS else self._enqueue_soon
        return Watch(self._client, self.store, touched, resource, namespace, self._pace.restart)

    async def _serve_children(self, group: Sequence[str], watches: Sequence[Watch]) -> None:
        """List and watch until cancelled. Raises what ends a watch permanently."""
        unlisted = set(watches)

        def listed(watch: Watch) -> None:
            unlisted.discard(watch)
            if not unlisted:
                if group == (WORKLOAD,):
                    self._set_kueue_readable(True)
                self._listed(group)

        async with asyncio.TaskGroup() as tasks:
            for watch in watches:
                tasks.create_task(watch.serve(self._pace.relist, functools.partial(listed, watch)))

    async def _serve_jobs(self, resources: Sequence[Resource], watches: Sequence[Watch]) -> None:
        """List, and let kopf watch, until cancelled. Raises what ends a watch permanently."""
        for watch in watches:
            await watch.list()
        self._listed(JOBS)
        listing = asyncio.Event()

        def deliver(type: str | None, found: Object) -> None:
            # After a 410 kopf lists again, and does not report what was deleted meanwhile.
            if type is None:
                listing.set()
            owner, edited = owner_of(found), type != "MODIFIED" or self.store.is_edited(found)
            touched = self.store.remove(found) if type == "DELETED" else self.store.put(found)
            for key in touched:
                if owner and key == owner.key and not edited:  # the operator's own write, which came before its answer
                    self.queue.soon(key, settling.NOTHING, check=True)
                else:
                    self.queue.add(key, first=type == "MODIFIED")  # an edit: users wait for its effect

        async with asyncio.TaskGroup() as tasks:
            relisting = tasks.create_task(self._relist_jobs(watches, listing))
            await watch_jobs(
                resources, self.settings.namespaces, deliver, self.store.knows, self._take_signals, self._login
            )
            relisting.cancel()
        if self._signals:
            self._stop.set()

    async def _until_installed(self, resources: Sequence[Resource]) -> None:
        missing, kind = False, resources[0].kind
        while why := await self._unavailable(resources):
            if not missing:
                # Kueue is a choice; JobSet is needed.
                level = logging.INFO if kind == WORKLOAD else logging.WARNING
                log.log(level, "%s: checking every %g s", why, self._pace.discovery)
            missing = True
            if kind == JOBSET:
                # Jobs that do not need JobSet run. The others report that it is missing.
                self._set_jobset_installed(False)
                self._listed((JOBSET,))
            if kind == WORKLOAD:
                self._set_kueue_readable(False)
                self._listed((WORKLOAD,))
            await asyncio.sleep(self._pace.discovery)
        if kind == JOBSET:
            self._set_jobset_installed(True)

    async def _unavailable(self, resources: Sequence[Resource]) -> str:
        """Why `resources` cannot be watched: they are not installed, or the operator may not read Workloads of Kueue,
        which a role made by hand may leave out. Empty if they can. Raises ApiError.
        """
        if not await self._client.installed(resources):
            return f"the API server does not serve {resources[0].api_version}"
        if resources[0].kind != WORKLOAD:
            return ""
        try:
            for namespace in self._namespaces:
                await self._client.get(resources[0].path(namespace), {"limit": "1"})
        except ApiError as error:
            if error.status == 403:
                return f"the condition Admitted will not have Kueue's reasons: {error.message}"
            raise
        return ""

    def _set_kueue_readable(self, readable: bool) -> None:
        if self.store.workloads.listed == readable:
            return
        self.store.workloads.listed = readable
        if not readable:
            self.store.prune(WORKLOAD, None, set(), str(2**63))
        self._enqueue(set(self.store.keys()))

    def _set_jobset_installed(self, installed: bool) -> None:
        if self.store.jobset_installed == installed:
            return
        self.store.jobset_installed = installed
        if not installed:
            self._enqueue(self.store.prune(JOBSET, None, set(), str(2**63)))
        self._enqueue(set(self.store.keys()))

    def _listed(self, group: Sequence[str]) -> None:
        self._unlisted.discard(tuple(group))
        if not self._unlisted:
            self.ready.set()

    async def _relist_jobs(self, watches: Sequence[Watch], listing: asyncio.Event) -> None:
        """List periodically, and once after every list of kopf, each object of which sets `listing`.

        A list of kopf without any object is not seen. It could only mean that jobs were deleted unseen, and they are
        forgotten when their status is written.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.relist):
                    await listing.wait()
            while listing.is_set():  # kopf hands over the objects of one list one by one, for seconds
                listing.clear()
                await asyncio.sleep(self._pace.settle)
            try:
                for watch in watches:
                    await watch.list()
            except ApiError as error:
                log.warning("list of jobs: %s", error)

    def _enqueue(self, keys: set[Key], found: Object | None = None) -> None:
        for key in keys:
            self.queue.add(key)

    def _enqueue_soon(self, keys: set[Key], found: Object | None = None) -> None:
        for key in keys:
            seconds = settling.seconds(found, self.store.state(key)) if found else settling.ACT
            if seconds is not settling.NO_LOOK:
                self.queue.soon(key, seconds, check=seconds == settling.NOTHING)

    def _take_signals(self) -> None:
        """Handle signals here again, because kopf installs its own handlers at each start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            if self._signals:
                # Replaced, not removed first: without a handler a signal would kill the process.
                loop.add_signal_handler(number, self._stop.set)
            else:
                loop.remove_signal_handler(number)


async def serve(settings: Settings) -> None:
    """Run the operator until SIGTERM."""
    begin = time.monotonic()
    gc.set_threshold(*GC_THRESHOLDS)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)  # it logs every event
    configuration = await client_login()
    metrics = Metrics(VERSION, configuration.host, settings.workers)

    async def connect() -> Client:
        return Client(await client_login(), metrics.requested)

    identity = settings.identity or f"{socket.gethostname()}_{uuid.uuid4()}"
    election = Election(connect, settings.lease, identity) if settings.lease else None
    may_send = election.holds if election else lambda: True
    client = Client(configuration, metrics.requested, may_send=may_send)
    operator = Operator(settings, client, metrics, election=election)
    server = await health.serve(settings.metrics_port, operator.metrics_text, operator.alive, operator.serving)
    log.debug("started in %.1f s", time.monotonic() - begin)
    build_types()
    freezing = asyncio.create_task(freeze_when(operator.ready))
    try:
        await operator.serve()
    finally:
        freezing.cancel()
        await server.cleanup()
        await client.close()


def build_types() -> None:
    """Build the validators and serialisers of the types that each job needs. pydantic builds them at their first use,
    which takes as long as dozens of decisions.
    """
    jobs = [info.model for info in KINDS.values()]
    specs = [spec for job in jobs if (spec := model_in(job.model_fields["spec"].annotation))]
    documents: list[type[ApiModel]] = [*jobs, *specs, *RUNS.values(), TerminationMessage]
    of_status = [found for found in vars(status).values() if isinstance(found, type) and issubclass(found, ApiModel)]
    for model in (*documents, *of_status):
        model.model_rebuild()


async def freeze_when(ready: asyncio.Event) -> None:
    """Exempt modules, types and the first lists from the search for cycles: they stay."""
    await ready.wait()
    gc.collect()
    gc.freeze()


def run(settings: Settings | None = None) -> None:
    """Run `serve` in an event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings or Settings()))
