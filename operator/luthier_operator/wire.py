"""Reads what the API server sends: answers, lists and events.

Of children only the fields below are decoded, and the rest of the text is skipped. That takes a third of the time, and
a whole pod would be 30 KiB of Python objects, of which 1 KiB is ever read. A field of the type `Any` is taken as it is.
"""

from __future__ import annotations

import contextlib
from typing import Any, TypedDict

import msgspec

from luthier_operator.model import Object

CHILDREN = {"Job", "JobSet", "Pod"}
NOT_READ = {"ConfigMap", "Event"}
"""What is in them is known to whoever creates them."""


class Meta(TypedDict, total=False):
    name: Any
    namespace: Any
    uid: Any
    resourceVersion: Any
    creationTimestamp: Any
    deletionTimestamp: Any
    labels: Any
    annotations: Any
    ownerReferences: Any


class ContainerSpec(TypedDict, total=False):
    name: Any
    resources: Any


class Spec(TypedDict, total=False):
    nodeName: Any
    containers: list[ContainerSpec] | None
    suspend: Any
    managedBy: Any
    backoffLimitPerIndex: Any


class ContainerStatus(TypedDict, total=False):
    name: Any
    state: Any


class Status(TypedDict, total=False):
    phase: Any
    reason: Any
    message: Any
    podIP: Any
    conditions: Any
    containerStatuses: list[ContainerStatus] | None
    restarts: Any
    restartsCountTowardsMax: Any
    active: Any
    succeeded: Any
    failed: Any
    failedIndexes: Any


class Child(TypedDict, total=False):
    """A Job, a JobSet or a pod."""

    apiVersion: Any
    kind: Any
    metadata: Meta
    spec: Spec
    status: Status


class Event(TypedDict):
    type: str
    object: Child


class List(TypedDict):
    metadata: Any
    items: list[Child]


_CHILD = msgspec.json.Decoder(Child)
_EVENT = msgspec.json.Decoder(Event)
_LIST = msgspec.json.Decoder(List)
_ANYTHING = msgspec.json.Decoder()


def read_answer(text: bytes) -> Object:
    """The JSON object of an answer. A proxy may have answered in the place of the API server."""
    with contextlib.suppress(msgspec.DecodeError):
        answer = _ANYTHING.decode(text)
        if isinstance(answer, dict):
            return answer
    return {"message": text.decode(errors="replace")[:500]}


def read_list(kind: str, text: bytes) -> Object:
    """A list of objects of `kind`, or another answer."""
    if kind in CHILDREN:
        with contextlib.suppress(msgspec.DecodeError):
            found: Any = _LIST.decode(text)
            return dict(found)
    return read_answer(text)


def read_object(kind: str, text: bytes) -> Object:
    """An object of `kind` that was created, or another answer."""
    if kind in CHILDREN or kind in NOT_READ:
        with contextlib.suppress(msgspec.DecodeError):
            found: Any = _CHILD.decode(text)
            return dict(found)
    return read_answer(text)


def read_event(kind: str, line: bytes) -> tuple[str, Object]:
    """Type and object of one event of a watch of `kind`. The object of an ERROR is a status.

    Raises msgspec.DecodeError.
    """
    event: Any = None
    if kind in CHILDREN:
        with contextlib.suppress(msgspec.ValidationError):
            event = _EVENT.decode(line)
    if event is None or event["type"] == "ERROR":
        event = _ANYTHING.decode(line)
    return event["type"], event["object"]
