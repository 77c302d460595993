"""What a stored delivery would do."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from app.api.hooks import prepared
from app.core.errors import Refused
from app.core.incoming import EVENT_HEADERS, SIGNATURE_HEADERS, IncomingDelivery, delivery_id, signature_error
from app.settings import Settings, SettingsError


def judge(settings: Settings, name: str, body: bytes, headers: Sequence[str]) -> tuple[list[str], bool]:
    """(the lines to print, whether the delivery would start a job). Raises `SettingsError` for a wrong argument."""
    if name not in settings.hooks:
        known = ", ".join(settings.hooks) or "none"
        raise SettingsError(f"no hook is called {name!r}; the configuration has {known}")
    taken = prepared(name, settings.hooks[name])
    hook = taken.hook
    given: dict[str, str] = {}
    for header in headers:
        key, colon, value = header.partition(":")
        if not colon:
            raise SettingsError(f"expected 'NAME: VALUE' as a header, not {header!r}")
        given[key.strip().lower()] = value.strip()
    lines: list[str] = []
    signed = any(name.lower() in given for name in SIGNATURE_HEADERS.values())
    error = signature_error(hook.provider, taken.secret, IncomingDelivery(given, body), time.time()) if signed else None
    lines.append(f"signature: {error or 'valid'}" if signed else "signature: not given, so not looked at")
    if hook.provider in EVENT_HEADERS:
        given.setdefault(EVENT_HEADERS[hook.provider].lower(), hook.event)
    if error is not None:
        return [*lines, "answer: 401 signature-invalid"], False
    try:
        reason = taken.verdict(IncomingDelivery(given, body))
    except Refused as refused:
        return [*lines, f"answer: 422 invalid-request, {refused.problem.detail}"], False
    if reason is not None:
        return [*lines, f"answer: 200, ignored: {reason}"], False
    lines.append(f"delivery id: {delivery_id(hook.provider, given) or 'not given'}")
    lines.append(f"starts: POST /domains/{hook.domain}/disks/{hook.disk}/{hook.verb} {json.dumps(hook.body)}")
    return lines, True
