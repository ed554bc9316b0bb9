"""A quiet line for a node that could take part: it is offered, never forced."""

from __future__ import annotations

from PySide6.QtWidgets import QHBoxLayout, QVBoxLayout, QWidget

from app.cluster.presenter import ClusterPresenter
from app.widgets.making import make_button, make_card, make_label


class OfferBar(QWidget):
    """The first node on offer; visible only where there is one."""

    def __init__(
        self, presenter: ClusterPresenter, place: str, parent: QWidget | None = None
    ) -> None:
        """Follows the presenter.

        Args:
            place: first part of the object names, as there is one of these on several pages.
        """
        super().__init__(parent)
        self.setObjectName(f"{place}OfferBar")
        self._presenter = presenter
        self._name = ""
        self._text = make_label("", f"{place}OfferText", wraps=True)
        self._add_button = make_button(
            "Add to plan", f"{place}OfferAdd", "Give it a part of the draft on the Split page"
        )
        self._dismiss_button = make_button(
            "Not now", f"{place}OfferDismiss", "Leave the split as it is", kind="quiet"
        )
        frame = make_card(f"{place}OfferFrame", "bar")
        row = QHBoxLayout(frame)
        row.setContentsMargins(12, 6, 8, 6)
        row.addWidget(self._text, 1)
        row.addWidget(self._add_button)
        row.addWidget(self._dismiss_button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(frame)
        self._add_button.clicked.connect(self._on_add_clicked)
        self._dismiss_button.clicked.connect(self._on_dismiss_clicked)
        presenter.changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        """Show the first offer."""
        offers = self._presenter.offers
        self.setVisible(bool(offers))
        if offers:
            self._name = offers[0].name
            self._text.setText(f"{offers[0].words}. It can take part in the split.")
            self._add_button.setEnabled(self._presenter.can_add)

    def _on_add_clicked(self) -> None:
        self._presenter.add_to_plan(self._name)

    def _on_dismiss_clicked(self) -> None:
        self._presenter.dismiss(self._name)
