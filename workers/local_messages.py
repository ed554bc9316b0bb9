"""What the commands of this computer say to its running worker, and what that answers.

In: nothing. Out: typed messages. They come over the worker's control socket with the installation's
own key; nobody else's are heard. Every request may be repeated.
"""

from __future__ import annotations

from typing import Literal

from engine.cluster.messages import DeviceInfo, Failed, Message

PairingStage = Literal["off", "waiting", "compare", "confirmed", "paired", "refused"]


class AskStatus(Message, frozen=True):
    """Who are you, and what do you do? Answered by Status."""


class MakeToken(Message, frozen=True):
    """Make a join token; answered by Token."""


class Unpair(Message, frozen=True):
    """Trust an engine host no longer; `who` is its name or fingerprint. Answered by Unpaired."""

    who: str


class BeginPairing(Message, frozen=True):
    """Turn pairing mode on, for one attempt; answered by PairingState."""


class AskPairing(Message, frozen=True):
    """How far is it? Answered by PairingState; pairing mode ends when nobody asks any more."""


class JudgePairing(Message, frozen=True):
    """What the person here says about the digits; answered by PairingState."""

    is_same: bool


class EndPairing(Message, frozen=True):
    """Turn pairing mode off; answered by PairingState."""


class Token(Message, frozen=True):
    """A fresh join token; good once, for `seconds`."""

    token: str
    seconds: float


class Unpaired(Message, frozen=True):
    """Whom this computer trusts no longer."""

    name: str
    fingerprint: str


class PairingState(Message, frozen=True):
    """How far pairing is.

    Attributes:
        stage: "waiting" for an engine host; "compare": the person here must look; "confirmed":
            the one there must still look; "refused" by anyone, or too late: `reason` says it.
        host_name, fingerprint: who the other end says it is.
    """

    stage: PairingStage
    host_name: str = ""
    fingerprint: str = ""
    code: str = ""
    reason: str = ""
    seconds_left: float = 0.0


class RunnerStatus(Message, frozen=True):
    """A runner that runs."""

    device: str
    pid: int


class PairedHost(Message, frozen=True):
    """An engine host that is let in."""

    name: str
    fingerprint: str
    added_s: float


class RefusalStatus(Message, frozen=True):
    """Somebody who was not let in; `time_s` is seconds since the epoch."""

    time_s: float
    address: str
    fingerprint: str
    reason: str


class Status(Message, frozen=True):
    """Everything about a running worker; `holder` is "" when nobody has it."""

    name: str
    fingerprint: str
    endpoint: str
    version: str
    pid: int
    trusted_network: bool
    devices: tuple[DeviceInfo, ...]
    holder: str
    holder_fingerprint: str
    runners: tuple[RunnerStatus, ...]
    hosts: tuple[PairedHost, ...]
    refusals: tuple[RefusalStatus, ...]


LOCAL_REQUESTS = (
    AskStatus | MakeToken | Unpair | BeginPairing | AskPairing | JudgePairing | EndPairing
)
LOCAL_ANSWERS = Status | Token | Unpaired | PairingState | Failed
LocalRequest = LOCAL_REQUESTS
