"""Notices in a chat that takes what Slack's incoming webhooks take: Mattermost, Rocket.Chat and Discord do too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from peel_agent.records import Check, NoticeGroup
from peel_agent.spi import SinkPlugin, setting

from .network import HttpSettings, Poster
from .wording import headline, paragraphs

LONGEST_TEXT = 1900
"""Characters of `text`. Discord refuses more than 2,000; Slack shows the blocks instead."""

LONGEST_BLOCK = 2900
LONGEST_HEADER = 150
MOST_BLOCKS = 48
"""Slack refuses more than 3,000 characters in a block, 150 in a header, and more than 50 blocks."""


@dataclass(frozen=True)
class SlackSettings(HttpSettings):
    """`[[sink]]` with use = "slack": the webhook's address, which is a secret; `blocks` are Slack's own layout."""

    blocks: bool = setting(True)


class SlackSink:
    def __init__(self, settings: SlackSettings) -> None:
        self._with_blocks = settings.blocks
        self._poster = Poster(settings)

    def deliver(self, group: NoticeGroup) -> None:
        message = chat_message(group, with_blocks=self._with_blocks)
        self._poster.post(json.dumps(message).encode(), {"Content-Type": "application/json"})

    def where(self) -> str:
        return f"a chat at {self._poster.where()}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        """Whether the server is there and is who it says."""
        return self._poster.check()

    def close(self) -> None:
        """Each delivery has a connection of its own."""


def chat_message(group: NoticeGroup, *, with_blocks: bool) -> dict[str, object]:
    """The JSON of one message: what is too long for a chat is cut at a notice, and how many are left out is said."""
    title, notices = harmless(headline(group)), [harmless(paragraph) for paragraph in paragraphs(group)]
    message: dict[str, object] = {"text": "\n\n".join(_fitting([title, *notices], LONGEST_TEXT))}
    if with_blocks:
        header = {"type": "header", "text": {"type": "plain_text", "text": _cut(title, LONGEST_HEADER)}}
        shown = notices if len(notices) <= MOST_BLOCKS else [*notices[:MOST_BLOCKS], _left_out(notices[MOST_BLOCKS:])]
        message["blocks"] = [header, *(_block(paragraph) for paragraph in shown)]
    return message


def harmless(text: str) -> str:
    """Text of which a chat makes no link, and no mention that calls people: names come out of checkpoints."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("@", "@\u200b")


def _block(text: str) -> dict[str, object]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": _cut(text, LONGEST_BLOCK), "verbatim": True}}


def _fitting(parts: list[str], longest: int) -> list[str]:
    kept: list[str] = []
    room = longest - len(_left_out(parts))
    for part in parts:
        room -= len(part) + 2
        if room < 0:
            break
        kept.append(part)
    if len(kept) == len(parts):
        return parts
    if len(kept) <= 1:  # not even one notice fits: the beginning of it
        kept = [*parts[:1], _cut(parts[1], longest - len(parts[0]) - len(_left_out(parts)) - 4)]
    left = parts[len(kept) :]
    return [*kept, _left_out(left)] if left else kept


def _left_out(notices: Iterable[str]) -> str:
    return f"... and {len(list(notices))} more"


def _cut(text: str, longest: int) -> str:
    """Cut at a word, so that no escape is cut in two."""
    return text if len(text) <= longest else text[: longest - 4].rpartition(" ")[0] + " ..."


class SlackPlugin:
    name = "slack"
    settings = SlackSettings

    def connect(self, settings: SlackSettings, *, state_dir: Path) -> SlackSink:  # noqa: ARG002 -- the protocol's
        return SlackSink(settings)


PLUGIN: SinkPlugin = SlackPlugin()
