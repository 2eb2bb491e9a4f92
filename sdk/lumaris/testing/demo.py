"""The main job, told step by step: a text is split over three sellers, one of them is killed, the
rest finish, everybody is paid to the nano, and every receipt is checked offline.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import trio

from lumaris import processes
from lumaris.client import Client, make_request
from lumaris.coordinator import CoordinatorLink
from lumaris.jobs import JobRequest, JobResult, JobUpdate, LogLine
from lumaris.testing.devnet import Devnet, Program
from lumaris_overlay.private_files import read_key
from lumaris_protocol import codec, coordinator_api, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.payment import Settle
from lumaris_protocol.messages.receipt import ReceiptBundle
from lumaris_protocol.money import format_credits

SELLERS = 3
PARTS = 12
INPUT_BYTES_MIN = 1_000_000
_IMAGE = "python:3.12-wasi"
_SETTLE_S = 20.0
_WORDS = re.compile(r"[a-z']+")

Report = Callable[[str], None]


@dataclass
class _Story:
    """What happened, gathered while it happens."""

    report: Report
    net: Devnet
    victim: Program | None = None
    finished: dict[str, int] = field(default_factory=dict)  # parts by seller
    first_part: dict[str, str] = field(default_factory=dict)

    def observe(self, event: JobUpdate | LogLine) -> None:
        """Watch the run, and kill one seller in the middle of a part, once."""
        if isinstance(event, LogLine):
            return
        if event.state == "running":
            seller = self.net.seller(event.seller)
            first = self.first_part.setdefault(event.seller, event.job)
            if self.victim is None and first != event.job:
                self.victim = seller
                os.kill(seller.pid, signal.SIGKILL)
                self.report(f"  killed {seller.role} (SIGKILL) while it ran a part")
        elif event.state in ("failed", "killed", "error"):
            self.report(f"  a part failed on {self.net.seller(event.seller).role}: {event.detail}")

    def on_result(self, index: int, result: JobResult) -> None:
        """One part is done."""
        role = self.net.seller(result.seller).role
        again = f" (attempt {result.attempts})" if result.attempts > 1 else ""
        said = result.stdout.decode(errors="replace").strip()
        self.finished[role] = self.finished.get(role, 0) + result.ok
        self.report(
            f"  part {index + 1:2d}/{PARTS} {role}{again}: {said}, {result.wall_ms} ms,"
            f" {result.cost} TEST"
        )


def run_demo(input_file: Path | None, keep: bool, report: Report) -> dict[str, Any]:
    """Run it all and tear it down. Raises LumarisError; nothing is left behind then either.

    The record has `equal`, `balanced`, `receipts_valid`, `paid`, `seconds` and `left_behind`.
    """
    text = read_text(input_file)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="lumaris-"))
    net = Devnet(folder / "devnet", SELLERS, keep=True, tiers=("wasm",))
    try:
        report("Starting a coordinator and three sellers, each its own process ...")
        with net:
            report(f"  ready in {time.monotonic() - began:.1f} s: coordinator {net.url}")
            record = _trade(net, text, folder, report)
        left = [f"process {command}" for command in processes.naming(str(folder))]
        left += [str(path) for path in folder.rglob("*.sock")]
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if not keep and folder.exists():
        left.append(str(folder))
    record["left_behind"] = left
    record["seconds"] = round(time.monotonic() - began, 2)
    report(f"Torn down; left behind: {', '.join(left) or 'nothing'}. {record['seconds']} s in all.")
    if keep:
        report(f"Kept for a look: {folder}")
    return record


def read_text(input_file: Path | None) -> str:
    """The text to count. Raises LumarisError `bad_input` when unreadable or too short to split."""
    if input_file is None:
        return _data("kjv.txt").decode()
    try:
        text = input_file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LumarisError("bad_input", f"{input_file}: {error.strerror}") from None
    if len(text.splitlines()) < PARTS:
        raise LumarisError("bad_input", f"{input_file} has fewer than {PARTS} lines.")
    return text


def split_text(text: str, parts: int) -> list[str]:
    """About equal parts, cut between lines."""
    lines = text.splitlines(keepends=True)
    found: list[str] = []
    current: list[str] = []
    size, length = len(text) / parts, 0
    for line in lines:
        current.append(line)
        length += len(line)
        if length >= size * (len(found) + 1) and len(found) < parts - 1:
            found.append("".join(current))
            current = []
    return [*found, "".join(current)]


def count_words(text: str) -> Counter[str]:
    """The plain local count that the market's result must equal."""
    return Counter(_WORDS.findall(text.lower()))


def _trade(net: Devnet, text: str, folder: Path, report: Report) -> dict[str, Any]:
    story = _Story(report, net)
    with net.client() as client:
        account = client.account()
        report(f"  buyer has {format_credits(account.free_nanos)} {account.currency}")
        report(f"Counting the words of {len(text):,} characters in {PARTS} parts on wasm ...")
        results = client.map(
            _requests(text, folder),
            sellers=SELLERS,
            budget="0.3",
            observe=story.observe,
            on_result=story.on_result,
        )
        merged = _merge(results)
        equal = merged == count_words(text)
        report(
            f"  {sum(merged.values()):,} words, {len(merged):,} different;"
            f" {'equal to' if equal else 'DIFFERENT FROM'} a plain local count"
        )
        if story.victim is not None:
            index = net.nodes.index(story.victim)
            net.nodes[index] = net.start_seller(story.victim.role)
            report(f"  {story.victim.role} restarted and settles what it was cut off from")
        bundles = _settle(client)
        receipts_valid = _verify(bundles, client, folder, report)
        refused = _pay_twice(net, client, bundles, report)
        paid = _paid(net, bundles, report)
        account, audit = client.account(), client.audit()
    report(
        f"Ledger: {audit.transfers} transfers in {audit.accounts} accounts sum to"
        f" {audit.sum_nanos}; {'balanced' if audit.balanced else 'NOT BALANCED'}."
        f" Buyer: free {format_credits(account.free_nanos)},"
        f" held {format_credits(account.held_nanos)}"
    )
    return {
        "equal": equal,
        "words": sum(merged.values()),
        "killed": story.victim.role if story.victim else "",
        "parts_by_seller": story.finished,
        "double_payment_refused": refused,
        "receipts_valid": receipts_valid,
        "paid": paid,
        "buyer_free_nanos": account.free_nanos,
        "buyer_held_nanos": account.held_nanos,
        "balanced": audit.balanced,
    }


def _requests(text: str, folder: Path) -> list[JobRequest]:
    script, parts = folder / "count_words.py", folder / "parts"
    script.write_bytes(_data("count_words.py"))
    parts.mkdir()
    requests = []
    for index, part in enumerate(split_text(text, PARTS)):
        source = parts / f"part-{index:02d}.txt"
        source.write_text(part, encoding="utf-8")
        requests.append(
            make_request(
                _IMAGE,
                ["python", "/in/count_words.py", "/in/part.txt"],
                inputs={"count_words.py": script, "part.txt": source},
                timeout_s=120,
            )
        )
    return requests


def _merge(results: list[JobResult]) -> Counter[str]:
    merged: Counter[str] = Counter()
    for result in results:
        if not result.ok:
            raise LumarisError("job_failed", f"A part ended with {result.reason}: {result.detail}")
        merged.update(json.loads(result.artifacts["counts.json"].file.read_bytes()))
    return merged


def _settle(client: Client) -> dict[str, bytes]:
    """The receipt file of every session, once all are settled. Raises LumarisError `timeout`."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        client.settle()
        sessions = client.sessions()
        open_sessions = [item for item in sessions if item["state"] != "settled"]
        if not open_sessions:
            break
        if time.monotonic() > deadline:
            raise LumarisError("timeout", f"{len(open_sessions)} sessions are not settled.")
        time.sleep(0.2)
    found = {item["session"]: client.receipt(item["session"]) for item in sessions}
    return {session: receipt for session, receipt in found.items() if receipt is not None}


def _verify(bundles: dict[str, bytes], client: Client, folder: Path, report: Report) -> bool:
    trusted = frozenset({client.coordinator})
    verdicts = []
    for session, bundle in bundles.items():
        path = folder / f"{session}.receipt.json"
        path.write_bytes(bundle)
        verdicts.append(receipts.verify_bundle(path.read_bytes(), trusted=trusted).verdict)
    report(f"Receipts verified offline: {verdicts.count('valid')} of {len(verdicts)} valid")
    return bool(verdicts) and all(verdict == "valid" for verdict in verdicts)


def _paid(net: Devnet, bundles: dict[str, bytes], report: Report) -> dict[str, dict[str, int]]:
    """Who got what, from the receipts themselves."""
    paid: dict[str, dict[str, int]] = {}
    for bundle in bundles.values():
        receipt = receipts.verify_bundle(bundle, trusted=frozenset()).receipt
        assert receipt is not None, "verified a moment ago"
        row = paid.setdefault(net.seller(receipt.seller).role, dict.fromkeys(_COLUMNS, 0))
        for column in _COLUMNS:
            row[column] += getattr(receipt, column)
    report("Who was paid what (TEST credits, to the nano):")
    report(f"  {'SELLER':10} {'SELLER GETS':>14} {'FEE':>14} {'BUYER PAID':>14} {'RETURNED':>14}")
    for role, row in sorted(paid.items()):
        amounts = (row["seller_nanos"], row["fee_nanos"], row["paid_nanos"], row["refund_nanos"])
        report(f"  {role:10} " + " ".join(f"{format_credits(nanos):>14}" for nanos in amounts))
    return paid


_COLUMNS = ("seller_nanos", "fee_nanos", "paid_nanos", "refund_nanos")


def _pay_twice(net: Devnet, client: Client, bundles: dict[str, bytes], report: Report) -> bool:
    """A seller claims its payment again, in three ways; none of them may move money."""
    bundle = max(
        (receipts.decode_bundle(data) for data in bundles.values()),
        key=lambda item: item.voucher is not None,
    )
    before = client.audit().transfers
    again = trio.run(_claim_again, net, bundle, None)
    more = trio.run(_claim_again, net, bundle, 1)
    other = trio.run(_claim_again, net, bundle, 0)
    unmoved = client.audit().transfers == before
    report(
        f"Paying a seller twice: claimed again: {again}; claimed more: {more};"
        f" claimed another total: {other}; transfers made: {client.audit().transfers - before}"
    )
    return unmoved and more != "paid" and other == "already_settled"


async def _claim_again(net: Devnet, bundle: ReceiptBundle, change: int | None) -> str:
    """Send a settled claim again: as it was (None), for more (1), or for nothing (0)."""
    receipt = receipts.verify_bundle(receipts.encode_bundle(bundle), trusted=frozenset())
    assert receipt.receipt is not None, "verified a moment ago"
    told, node = receipt.receipt, net.seller(receipt.receipt.seller)
    key = read_key(Path(node.state) / "node.key")
    total = {None: told.paid_nanos, 1: told.paid_nanos + 1, 0: 0}[change]
    claim = Settle(
        session=told.session,
        party=key.peer_id,
        coordinator=receipt.coordinator,
        total_nanos=total,
        agreement_by_buyer=bundle.agreement_by_buyer,
        agreement_by_seller=bundle.agreement_by_seller,
        grant=bundle.grant,
        voucher=bundle.voucher if change != 0 else None,
        issued_at=int(time.time()),
    )
    link = CoordinatorLink(net.url)
    try:
        signed = codec.sign(claim, key, bundle.network)
        answer = await link.call(coordinator_api.settle(signed.data))
    except LumarisError as error:
        return error.code
    finally:
        await link.aclose()
    same = isinstance(answer, bytes) and receipts.decode_bundle(answer).receipt == bundle.receipt
    return "the same receipt" if same else "paid"


def _data(name: str) -> bytes:
    return resources.files("lumaris.testing").joinpath("data", name).read_bytes()
