"""What a person decides about people's data: held feedback is accepted or rejected, a subject is erased."""

import time
from collections.abc import Callable

from daemon import erasure, review
from daemon.control import Action, Command
from daemon.service.house import House
from daemon.service.orders import CannotBeDone, Said


class Desk:
    """The orders `accept`, `reject` and `erase`."""

    def __init__(self, house: House, cancel: Callable[[str], object]) -> None:
        self._house, self._cancel = house, cancel

    def actions(self) -> dict[Action, Callable[[Command], Said]]:
        """For the table of `Orders`."""
        return {"accept": self._accept, "reject": self._reject, "erase": self._erase}

    def _accept(self, command: Command) -> Said:
        if (chosen := self._chosen(command)) is not None:
            model = command.order.model or ""
            house, actor, now = self._house, command.actor, time.time()
            number, new = review.accept_all(house.database, house.config, model, chosen, actor, now)
            return f"{number} records are accepted: {new} new examples wait for {model}", {"examples": new}
        model, record = self._record(command)
        try:
            new = review.accept(
                self._house.database, self._house.config, model, record, command.actor, time.time()
            )  # fmt: skip
        except review.NotHeld as error:
            raise CannotBeDone(str(error)) from None
        return f"{record} is accepted: {new} new examples wait for {model}", {"examples": new}

    def _reject(self, command: Command) -> Said:
        if (chosen := self._chosen(command)) is not None:
            number = review.reject_all(self._house.database, command.order.model or "", chosen, command.actor)
            return f"{number} records are rejected: nothing is learned from them", {"records": number}
        model, record = self._record(command)
        try:
            review.reject(self._house.database, model, record, command.actor)
        except review.NotHeld as error:
            raise CannotBeDone(str(error)) from None
        return f"{record} is rejected: nothing is learned from it", {}

    def _erase(self, command: Command) -> Said:
        receipt, ended = self._without_runs(command.order.subject or "")
        versions = ", ".join(f"{model}: {numbers}" for model, numbers in receipt.versions.items()) or "none"
        text = (
            f"{receipt.records} records and {receipt.examples} examples are erased; versions that have learned from"
            f" them: {versions}; files of the library that still hold them: {', '.join(receipt.files) or 'none'}"
        )
        if ended:
            text += f"; runs that were learning from them are ended and begin again without: {', '.join(ended)}"
        return text, {"records": receipt.records, "examples": receipt.examples, "versions": receipt.versions}

    def _chosen(self, command: Command) -> review.Chosen | None:
        """Everything for a reason or of a subject is meant, and not one record."""
        order = command.order
        is_known = order.model in self._house.config.models
        if order.record_id or not is_known or not (order.why or order.subject):
            return None
        return review.Chosen(order.why, order.subject)

    def _without_runs(self, subject: str) -> tuple[erasure.Receipt, list[str]]:
        """Erase, ending the runs that use the data: what else they had waits again, and is due as before."""
        ended: list[str] = []
        while True:
            try:
                return erasure.erase(self._house.database, self._house.config, subject, time.time()), ended
            except erasure.InUse as error:
                self._cancel(error.run_id)
                ended.append(error.run_id)
            except erasure.CannotErase as error:
                raise CannotBeDone(str(error)) from None

    def _record(self, command: Command) -> tuple[str, str]:
        if command.order.model not in self._house.config.models or not command.order.record_id:
            raise CannotBeDone("give a model of the configuration and the id of a record; see: eternad review ls")
        return command.order.model, command.order.record_id
