"""What backing strings mean, by QEMU's rules."""

from __future__ import annotations

import pytest

from app.core.headers import Meaning, meaning

OVERLAY = "/images/web1/s3.qcow2"


@pytest.mark.parametrize(
    ("string", "found"),
    [
        pytest.param("/images/base.qcow2", Meaning(path="/images/base.qcow2"), id="absolute"),
        pytest.param("/images/vm:1.qcow2", Meaning(path="/images/vm:1.qcow2"), id="a-colon-behind-a-slash"),
        pytest.param("base.qcow2", Meaning(path="/images/web1/base.qcow2"), id="relative"),
        pytest.param("../base.qcow2", Meaning(path="/images/web1/../base.qcow2"), id="dots-stay-for-the-kernel"),
        pytest.param("./vm:1.qcow2", Meaning(path="/images/web1/./vm:1.qcow2"), id="a-colon-behind-a-dot"),
        pytest.param("vm:1.qcow2", Meaning(path=None), id="a-colon-makes-a-protocol"),
        pytest.param("nbd://host/export", Meaning(path=None), id="a-network"),
        pytest.param("file:/images/base.qcow2", Meaning(path="/images/base.qcow2"), id="file-absolute"),
        pytest.param("file:base.qcow2", Meaning(path="/srv/base.qcow2"), id="file-starts-from-qemu-s-folder"),
        pytest.param("", None, id="empty"),
        pytest.param('json:{"file.filename":"/b\\u0000/c"}', None, id="json-with-a-nul"),
        pytest.param('json:{"file.filename":"/b\\ud800"}', None, id="json-with-half-a-character"),
        pytest.param('json:{"file.filename":"/b\\udc80"}', None, id="json-with-the-other-half"),
        pytest.param('json:{"file.filename":"/\\ud83d\\ude00"}', Meaning(path="/\U0001f600"), id="json-with-a-pair"),
        pytest.param(
            'json:{"driver":"raw\\udc80","file":{"driver":"file","filename":"/b"}}',
            None,
            id="json-of-a-driver-with-half-a-character",
        ),
        pytest.param('json:{"file.filename":"/b"}', Meaning(path="/b"), id="json-with-dots"),
        pytest.param(
            'json:{"driver":"raw","offset":65536,"file":{"driver":"file","filename":"/b"}}',
            Meaning(path="/b", driver="raw", options=True),
            id="json-at-an-offset",
        ),
        pytest.param(
            'json:{"driver":"qcow2","encrypt.key-secret":"sec0","file.filename":"b"}',
            Meaning(path="/srv/b", driver="qcow2", options=True),
            id="json-with-a-key",
        ),
        pytest.param('json:{"driver":"file","filename":"/b"}', Meaning(path="/b"), id="json-of-a-protocol"),
        pytest.param(
            'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"/b"}}',
            Meaning(path="/b", driver="qcow2", backing=""),
            id="json-without-a-backing",
        ),
        pytest.param(
            'json:{"driver":"qcow2","backing":{"driver":"raw"},"file":{"driver":"file","filename":"/b"}}',
            Meaning(path="/b", driver="qcow2", backing='json:{"driver": "raw"}'),
            id="json-with-another-backing",
        ),
        pytest.param(
            'json:{"driver":"qcow2","backing.file.filename":"/c","file.filename":"/b"}',
            Meaning(path="/b", driver="qcow2", backing='json:{"file.filename": "/c"}'),
            id="json-with-another-backing-in-dots",
        ),
        pytest.param(
            'json:{"driver":"qcow2","backing":"node0","file":{"driver":"file","filename":"/b"}}',
            Meaning(path="/b", driver="qcow2", backing='json:"node0"'),
            id="json-with-a-node-as-backing",
        ),
        pytest.param('json:{"driver":"raw","file":"node0"}', None, id="json-of-a-node"),
        pytest.param(
            'json:{"driver":"qcow2","file":{"driver":"throttle","throttle-group":"g","file":'
            '{"driver":"blkdebug","image":{"driver":"file","filename":"/b"}}}}',
            Meaning(path="/b", driver="qcow2"),
            id="json-through-filters",
        ),
        pytest.param(
            'json:{"driver":"raw","file":' + '{"driver":"throttle","file":' * 20 + '{"filename":"/b"}' + "}" * 21,
            Meaning(path=None, options=True),
            id="json-through-too-many-filters",
        ),
        pytest.param('json:{"driver":"nbd","host":"h"}', Meaning(path=None, options=True), id="json-of-a-network"),
        pytest.param('json:{"driver":"qcow2","file":{"driver":"file"}}', None, id="json-without-a-name"),
        pytest.param("json:[]", None, id="json-of-a-list"),
        pytest.param("json:{", None, id="json-cut-short"),
        pytest.param("json:" + "[" * 200_000, None, id="json-too-deep"),
    ],
)
def test_meaning(string: str, found: Meaning | None) -> None:
    assert meaning(string, overlay=OVERLAY, folder="/srv") == found


def test_a_folder_that_nobody_knows_leads_nowhere() -> None:
    assert meaning("base.qcow2", overlay="json:{}") is None
    assert meaning("file:base.qcow2", overlay=OVERLAY) is None
    assert meaning('json:{"file.filename":"b"}', overlay=OVERLAY) is None
