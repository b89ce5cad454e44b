import io

import pytest

from lbproxy import errors
from lbproxy.kernel import features, libbpf, trials


def test_this_kernel_has_them_all() -> None:
    features.check()
    features.check_capabilities()


@pytest.mark.parametrize("missing", features.FEATURES, ids=lambda feature: feature.what)
def test_a_missing_feature_is_named_with_the_version_that_has_it(missing: features.Feature) -> None:
    with pytest.raises(errors.UnsupportedKernel) as lacking:
        features.check(
            lambda kind: missing.helper is not None or kind != missing.prog_type,
            lambda kind, helper: (kind, helper) != (missing.prog_type, missing.helper),
        )
    assert (lacking.value.feature, lacking.value.since) == (missing.what, missing.since)
    assert str(lacking.value) == (
        f"this kernel lacks {missing.what}, which exists since Linux {missing.since}: use a newer kernel"
    )
    assert lacking.value.exit_status == 3


def test_a_probe_without_an_answer_decides_nothing() -> None:
    features.check(lambda _kind: None, lambda _kind, _helper: None)


def test_probes_of_what_no_kernel_has_say_no() -> None:
    assert trials.helper(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 100_000) is not True
    assert trials.prog_type(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR) is True


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (0, "lacks CAP_NET_ADMIN and CAP_BPF"),
        (1 << 39, "lacks CAP_NET_ADMIN:"),
        (1 << 12, "lacks CAP_BPF:"),
        (1 << 12 | 1 << 39, None),
        (1 << 21, None),
    ],
)
def test_missing_capabilities_are_named(monkeypatch: pytest.MonkeyPatch, bits: int, said: str | None) -> None:
    status = f"Name:\tlbproxy\nCapEff:\t{bits:016x}\n"
    monkeypatch.setattr(features, "open", lambda _path, **_options: io.StringIO(status), raising=False)
    if said is None:
        features.check_capabilities()
        return
    with pytest.raises(errors.AgentError, match=said):
        features.check_capabilities()
