"""The card in which a person compares the codes of two computers."""

from __future__ import annotations

from PySide6.QtGui import QFont
from PySide6.QtWidgets import QHBoxLayout, QVBoxLayout, QWidget

from app.cluster.presenter import ClusterPresenter, Pairing
from app.figures import figure_age
from app.widgets.making import make_button, make_card, make_label, set_property

CODE_SPACING_PX = 4


class PairingCard(QWidget):
    """Visible while a pairing is under way, and after one that failed until it is closed."""

    def __init__(self, presenter: ClusterPresenter, parent: QWidget | None = None) -> None:
        """Follows the presenter; `tick` follows time."""
        super().__init__(parent)
        self.setObjectName("pairingCard")
        self._presenter = presenter
        self._frame = make_card("pairingFrame", "bar")
        self._title = make_label("", "pairingTitle", "title")
        self._left = make_label("", "pairingLeft", "small")
        self._code = make_label("", "pairingCode", "large")
        self._text = make_label("", "pairingText", wraps=True)
        self.same_button = make_button(
            "Codes are the same", "codesSameButton", "Trust this computer", kind="primary"
        )
        self.differ_button = make_button(
            "They differ", "codesDifferButton", "Do not trust this computer"
        )
        self.again_button = make_button(
            "Try again", "pairAgainButton", "Begin to pair once more", kind="primary"
        )
        self.close_button = make_button(
            "Cancel", "pairingCloseButton", "Give up pairing", kind="quiet"
        )
        self._build()
        self.same_button.clicked.connect(self._on_same_clicked)
        self.differ_button.clicked.connect(self._on_differ_clicked)
        self.again_button.clicked.connect(self._on_again_clicked)
        self.close_button.clicked.connect(presenter.close_pairing)
        presenter.changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show how far the attempt is."""
        pairing = self._presenter.pairing
        self.setVisible(pairing is not None)
        if pairing is None:
            return
        name = pairing.name
        is_asking = bool(pairing.code) and pairing.answer is None and not pairing.error
        self._title.setText(f"Pairing with {name}")
        self._code.setVisible(bool(pairing.code) and not pairing.error)
        self._code.setText(f"{pairing.code[:3]} {pairing.code[3:]}")
        # Digit by digit, or a screen reader says a number of six figures.
        self._code.setAccessibleName(f"Code {' '.join(pairing.code)}")
        self._text.setText(self._words(pairing))
        set_property(self._text, "role", "bad" if pairing.error else "")
        self.same_button.setVisible(is_asking)
        self.differ_button.setVisible(is_asking)
        self.again_button.setVisible(bool(pairing.error))
        self.close_button.setVisible(not is_asking)
        self.close_button.setText("Close" if pairing.error else "Cancel")
        self.tick()

    def tick(self) -> None:
        """Show how much time is left."""
        pairing = self._presenter.pairing
        if pairing is None:
            return
        left = self._presenter.seconds_left()
        self._left.setVisible(not pairing.error)
        self._left.setText(f"{figure_age(left)} left")

    def _words(self, pairing: Pairing) -> str:
        name = pairing.name
        if pairing.error:
            return pairing.error
        if not pairing.code:
            return f"On {name} run:  shardmix-worker pair. Waiting for it to answer."
        if pairing.answer is None:
            return f"Is the same code shown on {name} (run  shardmix-worker pair  there)?"
        if pairing.answer:
            return f"Waiting for the same to be said on {name}."
        return f"Ending the attempt: {name} is not trusted."

    def _build(self) -> None:
        font = QFont(self._code.font())
        font.setLetterSpacing(QFont.SpacingType.AbsoluteSpacing, CODE_SPACING_PX)
        self._code.setFont(font)
        head = QHBoxLayout()
        head.addWidget(self._title)
        head.addStretch(1)
        head.addWidget(self._left)
        row = QHBoxLayout()
        row.setSpacing(16)
        row.addWidget(self._code)
        row.addWidget(self._text, 1)
        for button in (
            self.same_button,
            self.differ_button,
            self.again_button,
            self.close_button,
        ):
            row.addWidget(button)
        inside = QVBoxLayout(self._frame)
        inside.setContentsMargins(12, 10, 12, 10)
        inside.setSpacing(8)
        inside.addLayout(head)
        inside.addLayout(row)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._frame)

    def _on_same_clicked(self) -> None:
        self._presenter.answer(True)

    def _on_differ_clicked(self) -> None:
        self._presenter.answer(False)

    def _on_again_clicked(self) -> None:
        pairing = self._presenter.pairing
        if pairing is not None:
            self._presenter.pair(pairing.name)
