"""The conversation: what was said, what is being said, and what it took. No widgets.

In: a person's questions, and the events of the session. Out: messages, and signals that say which
one changed and which text was added to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from PySide6.QtCore import QObject, Signal

from app.figures import UNKNOWN, figure, figure_percent, figure_seconds, plural
from app.plan_facts import row_weights, weight_share
from app.plan_in_force import went_on_text
from app.session import Session
from engine.cluster.messages import Message as EngineMessage
from engine.host.messages import (
    CallFailed,
    ChatTurn,
    Finished,
    Generate,
    Progress,
    SamplingSettings,
    TokensGenerated,
)

# Room that is kept for an answer when the conversation is cut to the context.
ANSWER_RESERVE_TOKENS = 512
_CHARS_PER_TOKEN = 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How answers are made; the parameters panel edits this."""

    system_prompt: str = ""
    temperature: float = 0.3
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 0
    seed: int | None = None

    def sampling(self) -> SamplingSettings:
        """The part that chooses tokens."""
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A device's part in an answer, by its share of the weights."""

    device: str
    label: str
    fraction: float


@dataclass(slots=True)
class Pause:
    """An answer waits, because a device that computed it was lost.

    Attributes:
        reason: what was lost, in words.
        started_s: on the clock of the session.
        lost: devices that no longer compute; None until another plan is in force.
    """

    reason: str
    started_s: float
    lost: list[str] | None = None


@dataclass(slots=True, kw_only=True)
class ChatMessage:
    """One message; answers change while they stream.

    Attributes:
        state: "asking" until the first sign of life, "reading" the prompt, "writing", then one of
            "done", "stopped" (by the reader), "failed".
        read_tokens, prompt_tokens: progress of reading the prompt; 0 of 0 where unknown.
        is_left_out: no longer sent, because the context is full.
        pause: while the answer waits for a lost device to be worked around; None otherwise.
        notes: what happened to it on the way.
    """

    role: str
    text: str = ""
    state: str = "done"
    error: str = ""
    read_tokens: int = 0
    prompt_tokens: int = 0
    num_tokens: int = 0
    finished: Finished | None = None
    shares: list[DeviceShare] = field(default_factory=list)
    is_left_out: bool = False
    pause: Pause | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether more of this answer may come."""
        return self.state in ("asking", "reading", "writing")


class Conversation(QObject):
    """The messages of one chat, and the answer under way.

    Attributes:
        used_tokens: positions of the context that the conversation fills; None while unknown.
        ttft_s, decode_tps: of the last answer; None before.
    """

    was_reset = Signal()
    message_added = Signal(int)
    text_added = Signal(int, str)
    message_changed = Signal(int)
    state_changed = Signal()

    def __init__(self, session: Session, parent: QObject | None = None) -> None:
        """An empty conversation."""
        super().__init__(parent)
        self._session = session
        self.settings = ChatSettings()
        self.messages: list[ChatMessage] = []
        self.used_tokens: int | None = None
        self.ttft_s: float | None = None
        self.decode_tps: float | None = None
        self._request_id = 0
        self._answer = -1
        self._model_path: str | None = None
        session.model_changed.connect(self._on_model_changed)
        session.stage_changed.connect(self.state_changed)
        session.plan_changed.connect(self._on_plan_changed)
        session.plan_interrupted.connect(self._on_plan_interrupted)
        session.plan_recovered.connect(self._on_plan_recovered)

    @property
    def is_answering(self) -> bool:
        """Whether an answer is under way."""
        return self._answer >= 0

    @property
    def can_send(self) -> bool:
        """Whether a question would be answered now."""
        return self._session.is_ready and not self.is_answering

    @property
    def can_regenerate(self) -> bool:
        """Whether the last answer can be made again."""
        return self.can_send and len(self.messages) >= 2

    def send(self, text: str) -> bool:
        """Ask a question.

        Returns: False where nothing was sent, because it is blank or nobody can answer.
        """
        text = text.strip()
        if not text or not self.can_send:
            return False
        self._session.dismiss_trouble()
        self._add(ChatMessage(role="user", text=text))
        self._ask()
        return True

    def stop(self) -> None:
        """End the answer under way; what was written stays."""
        if self.is_answering:
            self._session.cancel(self._request_id)

    def regenerate(self) -> None:
        """Answer the last question once more."""
        if not self.can_regenerate:
            return
        while self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        self.was_reset.emit()
        self._ask()

    def new_chat(self) -> None:
        """Forget everything; an answer under way is ended."""
        self.stop()
        self._answer = -1
        self._request_id = 0
        self.messages.clear()
        self.used_tokens = None
        self.was_reset.emit()
        self.state_changed.emit()

    def facts(self, message: ChatMessage) -> str:
        """The line under an answer: what it took, in words."""
        match message.state:
            case "asking":
                return "waiting for the engine"
            case "reading":
                return self._reading_text(message)
            case "writing":
                return f"{plural(message.num_tokens, 'token')} so far"
            case _:
                return self._finished_text(message)

    def pause_text(self, message: ChatMessage) -> str:
        """Why an answer waits and what happens next; empty where it does not wait."""
        pause = message.pause
        if pause is None:
            return ""
        if pause.lost is None:
            reason = pause.reason.rstrip(". ")
            return f"{reason}. The other devices take over, then the answer goes on."
        return "The other devices have taken over and read the conversation again."

    def turns(self) -> tuple[ChatTurn, ...]:
        """What a request would send: the system prompt, then the messages that still fit."""
        turns: list[ChatTurn] = []
        if self.settings.system_prompt.strip():
            turns.append(ChatTurn(role="system", content=self.settings.system_prompt.strip()))
        for message in self.messages:
            if message.is_left_out or message.is_open or not message.text:
                continue
            role = "user" if message.role == "user" else "assistant"
            turns.append(ChatTurn(role=role, content=message.text))
        return tuple(turns)

    @property
    def reading(self) -> Progress | None:
        """How far the prompt of the answer under way is read; None while nothing is read."""
        message = self.messages[self._answer] if self.is_answering else None
        if message is None or not message.prompt_tokens:
            return None
        if message.state != "reading" and message.pause is None:
            return None
        return Progress(
            request_id=self._request_id,
            phase="prefill",
            subject="prompt",
            done=message.read_tokens,
            total=message.prompt_tokens,
        )

    def _on_model_changed(self) -> None:
        """Another model begins another chat; the same one, opened again, goes on."""
        model = self._session.model
        path = None if model is None else model.path
        if self._model_path is not None and path != self._model_path:
            self.new_chat()
        self._model_path = path

    def _on_plan_changed(self) -> None:
        """Speeds were those of another split, or of the same one before it broke."""
        self.ttft_s = self.decode_tps = None
        self.state_changed.emit()

    def _on_plan_interrupted(self) -> None:
        interruption = self._session.in_force.interruption
        if not self.is_answering or interruption is None:
            return
        message = self.messages[self._answer]
        message.pause = Pause(interruption.message, interruption.started_s)
        message.read_tokens = message.prompt_tokens = 0
        self.message_changed.emit(self._answer)

    def _on_plan_recovered(self, lost: list[str]) -> None:
        if not self.is_answering:
            return
        message = self.messages[self._answer]
        if message.pause is not None:
            message.pause.lost = lost
            self.message_changed.emit(self._answer)

    def _end_pause(self, message: ChatMessage) -> None:
        """The answer goes on, after the other plan came into force."""
        pause = message.pause
        if pause is None or pause.lost is None:
            return
        seconds = self._session.clock() - pause.started_s
        words = went_on_text(pause.lost, self._session.device_label, seconds)
        message.notes.append(f"The answer {words}.")
        message.pause = None
        self.message_changed.emit(self._answer)

    def _ask(self) -> None:
        self._leave_out_oldest()
        turns = self.turns()
        settings = self.settings

        def make(request_id: int) -> EngineMessage:
            return Generate(
                request_id=request_id,
                turns=turns,
                max_tokens=settings.max_tokens,
                sampling=settings.sampling(),
            )

        self._add(ChatMessage(role="assistant", state="asking"))
        self._answer = len(self.messages) - 1
        self._request_id = self._session.call(make, self._on_event)
        self.state_changed.emit()

    def _add(self, message: ChatMessage) -> None:
        self.messages.append(message)
        self.message_added.emit(len(self.messages) - 1)

    def _leave_out_oldest(self) -> None:
        """Leave out the oldest turns, visibly, until the rest fits the context."""
        model = self._session.model
        if model is None:
            return
        budget = model.kv_window - min(ANSWER_RESERVE_TOKENS, model.kv_window // 2)
        kept = [message for message in self.messages if not message.is_left_out]
        sizes = [len(message.text) / _CHARS_PER_TOKEN + 8 for message in kept]
        total = sum(sizes)
        for message, size in zip(kept[:-1], sizes, strict=False):
            if total <= budget:
                break
            message.is_left_out = True
            total -= size
            self.message_changed.emit(self.messages.index(message))

    def _on_event(self, event: EngineMessage) -> None:
        if getattr(event, "request_id", None) != self._request_id or not self.is_answering:
            return
        index = self._answer
        message = self.messages[index]
        match event:
            case Progress() if event.phase != "prefill":
                pass
            case Progress():
                message.state = "reading" if not message.text else message.state
                message.read_tokens, message.prompt_tokens = event.done, event.total
                self.message_changed.emit(index)
            case TokensGenerated():
                self._end_pause(message)
                message.state = "writing"
                message.num_tokens += len(event.token_ids)
                message.text += event.text
                self.text_added.emit(index, event.text)
            case Finished():
                self._finish(message, event)
            case CallFailed():
                message.state = "failed"
                message.error = event.message
                self._close(index)
            case _:
                pass

    def _finish(self, message: ChatMessage, finished: Finished) -> None:
        index = self._answer
        self._end_pause(message)
        if finished.text.startswith(message.text) and len(finished.text) > len(message.text):
            missing = finished.text[len(message.text) :]
            message.text = finished.text
            self.text_added.emit(index, missing)
        message.state = "stopped" if finished.finish_reason == "cancelled" else "done"
        message.finished = finished
        message.num_tokens = len(finished.token_ids)
        message.shares = self._shares(finished) if finished.token_ids else []
        self.used_tokens = finished.prompt_tokens + len(finished.token_ids)
        if finished.token_ids:
            self.ttft_s = finished.ttft_s
            self.decode_tps = finished.decode_tps or None
        self._close(index)

    def _close(self, index: int) -> None:
        self.messages[index].pause = None
        self._answer = -1
        self.message_changed.emit(index)
        self.state_changed.emit()

    def _shares(self, finished: Finished) -> list[DeviceShare]:
        plan, model = finished.plan, self._session.model
        if model is None:
            return []
        weights = row_weights(model.config)
        return [
            DeviceShare(
                device, self._session.device_label(device), weight_share(plan, column, weights)
            )
            for column, device in enumerate(plan.devices)
            if column in plan.used_devices()
        ]

    @staticmethod
    def _reading_text(message: ChatMessage) -> str:
        if not message.prompt_tokens:
            return "reading the prompt"
        fraction = message.read_tokens / message.prompt_tokens
        return (
            f"reading the prompt {figure_percent(round(fraction, 2))} · "
            f"{message.read_tokens:,} of {message.prompt_tokens:,} tokens"
        )

    @staticmethod
    def _finished_text(message: ChatMessage) -> str:
        finished = message.finished
        if finished is None:
            is_cut = message.state == "failed" and message.num_tokens
            return f"{plural(message.num_tokens, 'token')} before it failed" if is_cut else ""
        if not finished.token_ids and finished.finish_reason == "cancelled":
            return "stopped by you before the first word"
        reasons = {
            "stop": "ended by itself",
            "length": "token limit",
            "cancelled": "stopped by you",
        }
        speed = figure(finished.decode_tps, "tok/s") if finished.decode_tps else UNKNOWN
        parts = [
            plural(len(finished.token_ids), "token"),
            speed,
            f"first token after {figure_seconds(finished.ttft_s)}",
            plural(max(1, len(finished.plan.used_devices())), "process"),
            reasons[finished.finish_reason],
        ]
        return " · ".join(parts)
