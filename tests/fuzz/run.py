"""Requests that schemathesis makes of the service's OpenAPI document, and what may be wrong with their answers."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from requests.adapters import HTTPAdapter
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.openapi.loaders import from_dict
from schemathesis.specs.openapi import checks
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from app.core.outgoing import new_secret, url_error
from tests.fuzz.world import DOMAINS, GONE, MACHINES, World
from tests.support.service import JSON

# schemathesis leaves the types of these open.
Operation: TypeAlias = Any
Case: TypeAlias = Any

URL = "http://blockjobd"
HANG = 30
"""Seconds in which every request has to be answered."""
EVERYWHERE = {"not-found", "method-not-allowed"}
"""Codes of the router, which the document of an operation does not list."""
MEMBERS = ("type", "title", "detail", "instance")
EXAMPLES = 20
"""Requests of one operation in a row."""
TENDED = 5
"""Requests after which the world is tended: most need a disk without a job, or a job that runs."""
WEIGHTS = {"commitBlocks": 6, "abortJob": 2, "setJobSpeed": 2, "registerDomain": 2, "pivotJob": 2}
CHECKS: list[Any] = [
    getattr(checks, name)
    for name in ("response_schema_conformance", "content_type_conformance", "negative_data_rejection")
]
CLOSED_PORT = "127.0.0.1:1"
RECEIVERS = (f"http://{CLOSED_PORT}/", "http://169.254.0.1/", "http://[::1]:1/", "http://nothing.invalid/")
"""Nothing that is asked for may lead away from this host."""


class _Connection(HTTPConnection):
    """A connection to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("blockjobd", timeout=HANG)
        self._path = path

    def _new_conn(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(HANG)
        made.connect(self._path)
        return made


class _Adapter(HTTPAdapter):
    """Sends the requests to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._pool = HTTPConnectionPool("blockjobd")

        def connection(**_options: object) -> HTTPConnection:
            return _Connection(path)

        self._pool.ConnectionCls = connection  # pyright: ignore[reportAttributeAccessIssue]

    def get_connection_with_tls_context(self, *_arguments: object, **_options: object) -> HTTPConnectionPool:
        return self._pool


@dataclass
class Report:
    """What was asked and answered: requests by operation and status, and every violation of the contract."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    codes: Counter[str] = field(default_factory=Counter[str])
    violations: list[str] = field(default_factory=list[str])
    slowest: tuple[float, str] = (0, "")

    @property
    def requests(self) -> int:
        """How many were sent."""
        return self.answers.total()

    def table(self) -> str:
        """All of it, for people."""
        statuses = sorted({status for _name, status in self.answers})
        rows = [["operation", *map(str, statuses), "all"]]
        for name in sorted({name for name, _status in self.answers}):
            counts = [self.answers[name, status] for status in statuses]
            rows.append([name, *(str(count or "") for count in counts), str(sum(counts))])
        totals = [sum(count for (_name, at), count in self.answers.items() if at == status) for status in statuses]
        rows.append(["all", *map(str, totals), str(self.requests)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        codes = ", ".join(f"{code} {count}" for code, count in self.codes.most_common())
        lines += ["", f"codes: {codes}", f"slowest: {self.slowest[0]:.1f} s, {self.slowest[1]}"]
        return "\n".join([*lines, f"violations: {len(self.violations)}", *self.violations[:50]])


class Fuzz:
    """Asks the service of `world` for anything that its document describes, and a bit more."""

    def __init__(self, world: World, seed: int) -> None:
        self.report = Report()
        self._world = world
        self._seed = seed
        self._random = random.Random(seed)
        self._session = requests.Session()
        self._session.mount(URL, cast(HTTPAdapter, _Adapter(str(world.service.socket))))
        self._token = (world.service.state_dir / "token").read_text().strip()
        document: JSON = world.service.client.get("/openapi.json").json()
        self._responses: dict[str, JSON] = {
            operation["operationId"]: operation["responses"]
            for path in document["paths"].values()
            for operation in path.values()
        }
        # Tokens are not what is generated, so that a request is not called wrong for its token.
        for path in document["paths"].values():
            for operation in path.values():
                operation.pop("security", None)
        self._operations: list[Operation] = [
            result.ok() for result in cast(Any, from_dict(document)).get_all_operations()
        ]

    def run(self, wanted: int) -> Report:
        """Send at least `wanted` requests."""
        turn = 0
        while self.report.requests < wanted:
            operation = self._choose(turn)
            wrong = turn >= len(self._operations) and self._maybe(0.4)
            mode = GenerationMode.NEGATIVE if wrong else GenerationMode.POSITIVE
            self._ask(operation, mode, min(EXAMPLES, wanted // len(self._operations) + 1), turn)
            turn += 1
        self._world.settle()
        self.report.violations += [*self._world.damage(), *self._complaints()]
        return self.report

    def _choose(self, turn: int) -> Operation:
        if turn < len(self._operations):
            return self._operations[turn]
        weights = [WEIGHTS.get(self._id(operation), 1) for operation in self._operations]
        return self._random.choices(self._operations, weights)[0]

    def _id(self, operation: Operation) -> str:
        return cast(JSON, operation.definition.raw)["operationId"]

    def _ask(self, operation: Operation, mode: GenerationMode, times: int, turn: int) -> None:
        phases, health = [Phase.generate], cast("list[HealthCheck]", list(HealthCheck))

        @seeded(self._seed * 1_000_003 + turn)
        @settings(max_examples=times, phases=phases, database=None, deadline=None, suppress_health_check=health)
        @given(case=operation.as_strategy(mode))
        def each(case: Case) -> None:
            if self.report.requests % TENDED == 0:
                self._world.tend()
            self._aim(case)
            self._send(case)

        try:
            each()
        except Unsatisfiable:
            # An operation without parameters has no invalid requests.
            if mode is GenerationMode.POSITIVE:
                raise

    # Requests that get somewhere --------------------------------------------------------------------------------------

    def _maybe(self, share: float) -> bool:
        return self._random.random() < share

    def _aim(self, case: Case) -> None:
        """Put names into a generated request that mean something here; keep it away from everything else."""
        path = case.path_parameters
        if "domain" in path and self._maybe(0.8):
            # Mostly the machines: what is off or gone has few answers.
            path["domain"] = self._random.choice([*MACHINES, *MACHINES, *DOMAINS])
        if "disk" in path and self._maybe(0.85):
            path["disk"] = self._random.choice([*["vda"] * 30, *self._world.names])
        if "job_id" in path and self._world.jobs and self._maybe(0.85):
            path["job_id"] = self._random.choice(self._world.jobs[-2:])
        if "webhook_id" in path and self._maybe(0.85):
            items: list[JSON] = self._world.service.client.get("/webhooks").json()["items"]
            path["webhook_id"] = self._random.choice(items)["id"] if items else "wh-none"
            deliveries = self._world.service.client.get(f"/webhooks/{path['webhook_id']}/deliveries?limit=3").json()
            if "delivery_id" in path and deliveries.get("items"):
                path["delivery_id"] = deliveries["items"][-1]["id"]
        for key in [key for key in case.headers if key.lower() == "prefer"]:
            if "wait" in str(case.headers[key]):
                case.headers[key] = "wait=1"
        if "prefer" in {key.lower() for key in case.headers} and self._maybe(0.3):
            case.headers["prefer"] = "wait=1"
        body: object = case.body
        if isinstance(body, dict):
            self._aim_body(case, cast(JSON, body))

    def _aim_body(self, case: Case, body: JSON) -> None:
        match self._id(case.operation):
            case "commitBlocks":
                self._aim_commit(case, body)
            case "registerDomain":
                self._aim_registration(case, body)
            case "createWebhook":
                self._aim_receiver(body)
            case _:
                pass

    def _aim_receiver(self, body: JSON) -> None:
        if isinstance(body.get("url"), str) and (self._maybe(0.8) or url_error(body["url"]) is None):
            body["url"] = self._random.choice(RECEIVERS)
        if isinstance(body.get("secret"), str) and self._maybe(0.8):
            body["secret"] = new_secret(self._random.randbytes(32))

    def _aim_commit(self, case: Case, body: JSON) -> None:
        if isinstance(body.get("callback"), dict):
            self._aim_receiver(cast(JSON, body["callback"]))
        for key in ("top", "base"):
            if key in body and self._maybe(0.7):
                body[key] = self._random.choice([None, *self._world.names])
        if self._maybe(0.5):
            # All that is wrong in it left out; the flags are what decides most.
            flags = self._random.choice([[], ["active"], ["active", "delete"], ["delete"], ["shallow"], 4])
            on_ready = self._random.choice(["wait", "pivot", "keep"]) if flags else "wait"
            body.clear()
            body |= {"flags": flags, "on_ready": on_ready, "bandwidth": self._random.choice([0, 0, 1])}
            if self._maybe(0.1):
                body["callback"] = {"url": self._random.choice(RECEIVERS)}
            if self._maybe(0.5):
                body["top"] = self._random.choice([None, "vda[1]", "vda[2]", *self._world.names])
        if case.query.get("dry_run") and self._maybe(0.5):
            del case.query["dry_run"]

    def _aim_registration(self, case: Case, body: JSON) -> None:
        domain = case.path_parameters.get("domain")
        if domain in DOMAINS and self._maybe(0.8):
            body.clear()
            body |= self._world.registration(self._random.choice([domain, domain, GONE]))
        elif isinstance(body.get("qmp"), dict):
            # Nothing but this world's own is to be connected to.
            monitor = cast(JSON, body["qmp"])
            if isinstance(monitor.get("unix"), str):
                place = self._random.choice([".", "none", "web1.qmp", "web1/l0.qcow2"])
                monitor["unix"] = str(self._world.folder / place)
            if isinstance(monitor.get("tcp"), str) and ":" in monitor["tcp"]:
                monitor["tcp"] = CLOSED_PORT

    # Answers ----------------------------------------------------------------------------------------------------------

    def _send(self, case: Case) -> None:
        name = self._id(case.operation)
        begin = time.monotonic()
        try:
            # An event stream has no end of its own: its head is all that is read of it.
            arguments: dict[str, Any] = case.as_transport_kwargs(base_url=URL)
            token = self._random.choice(["", "nonsense", "\xe9"]) if self._maybe(0.03) else self._token
            arguments["headers"]["Authorization"] = f"Bearer {token}"
            response = self._session.request(**arguments, timeout=HANG, stream=True, allow_redirects=False)
            with response:
                stream = response.headers.get("Content-Type", "").startswith("text/event-stream")
                text = "" if stream else response.content.decode(errors="backslashreplace")
        except requests.exceptions.InvalidHeader:
            return
        except requests.RequestException as error:
            self.report.answers[name, 0] += 1
            self._violation(case, f"no answer: {error!r}")
            return
        self.report.slowest = max(self.report.slowest, (time.monotonic() - begin, name))
        self.report.answers[name, response.status_code] += 1
        for wrong in self._wrong(case, name, response, text, stream=stream):
            self._violation(case, wrong)
        if name == "commitBlocks" and response.status_code == 202:
            self._world.jobs.append(response.json()["id"])

    def _wrong(self, case: Case, name: str, response: requests.Response, text: str, *, stream: bool) -> Iterator[str]:
        status = response.status_code
        if "Traceback" in text:
            yield f"a traceback: {text}"
        if status >= 400:
            code, wrong = self._judge_problem(name, response, text)
            yield from wrong
            if code in EVERYWHERE:
                return
        elif str(status) not in self._responses[name]:
            yield f"{status} is not named for it: {text}"
        if not stream:
            try:
                case.validate_response(response, checks=CHECKS)
            except (Failure, FailureGroup) as error:
                yield f"{status} is not as documented: {error}"

    def _judge_problem(self, name: str, response: requests.Response, text: str) -> tuple[str, list[str]]:
        """The code of a problem, and what is wrong with its document."""
        wrong: list[str] = []
        status = response.status_code
        try:
            problem: JSON = json.loads(text)
        except ValueError:
            problem = {}
        code = str(problem.get("code"))
        self.report.codes[code] += 1
        documented = json.dumps(self._responses[name].get(str(status), {}))
        if status == 500 or (code not in EVERYWHERE and f'"{code}"' not in documented):
            wrong.append(f"{status} {code} is not named for it: {text}")
        if response.headers.get("Content-Type") != "application/problem+json" or problem.get("status") != status:
            wrong.append(f"{status} is no problem document: {text}")
        if missing := [member for member in MEMBERS if not problem.get(member)]:
            wrong.append(f"{status} {code} lacks {missing}")
        if code == "invalid-request" and not problem.get("errors"):
            wrong.append(f"{status} names no field: {text}")
        return code, wrong

    def _violation(self, case: Case, what: str) -> None:
        self.report.violations.append(f"{case.method} {case.formatted_path} {case!r}\n    {what[:2000]}")

    def _complaints(self) -> Iterator[str]:
        """What stands in the service's log that should not; and whether it serves at all."""
        for line in self._world.service.log().splitlines():
            try:
                entry: JSON = json.loads(line)
            except ValueError:
                yield f"in the log: {line}"
                continue
            if entry.get("level") in ("error", "critical") or "exception" in entry:
                yield f"in the log: {line[:3000]}"
        if self._world.service.client.get("/livez").status_code != 200:
            yield "the service is not alive any more"
