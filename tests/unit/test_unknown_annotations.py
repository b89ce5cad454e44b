"""Annotations with lbproxy's prefix that it does not know."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbproxy.core import decode, identity, service_annotations, unknown_annotations
from tests.unit import test_decode


def warned(source: identity.Source) -> tuple[str, ...]:
    return decode.service(source).warnings


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        (["weigths"], "['lbproxy.io/weigths']: unknown annotation, did you mean lbproxy.io/weights?"),
        (["probes"], "['lbproxy.io/probes']: unknown annotation, did you mean lbproxy.io/probe?"),
        (["Weights"], "['lbproxy.io/Weights']: unknown annotation, did you mean lbproxy.io/weights?"),
        (["owner"], "['lbproxy.io/owner']: unknown annotation"),
        (
            ["slowstart", "x"],
            "['lbproxy.io/slowstart']: unknown annotation, did you mean lbproxy.io/slow-start? (and 1 more)",
        ),
        (["\n"], "['lbproxy.io/\\n']: unknown annotation"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_known_is_one_warning(keys: list[str], warning: str) -> None:
    value = test_decode.a_service({"annotations": {f"lbproxy.io/{key}": "x" for key in keys}})
    expected = (f"metadata.annotations{warning}: passed over",)
    assert warned(value) == expected
    assert warned(msgspec.json.encode(value)) == expected
    assert warned(msgspec.Raw(msgspec.json.encode(value))) == expected


def test_what_others_say_is_no_matter() -> None:
    applied = '{"metadata":{"annotations":{"lbproxy.io/weigths":"zone:a=2"}}}'
    value = test_decode.a_service(
        {
            "labels": {"lbproxy.io/team": "a"},
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": applied,
                "example.org/lbproxy.io": "x",
                "lbproxy.io/weights": "zone:a=2",
            },
        }
    )
    assert warned(value) == warned(msgspec.json.encode(value)) == ()
    assert warned(msgspec.json.encode(test_decode.a_service({"annotations": None}))) == ()
    ignored = test_decode.a_service({"annotations": {"lbproxy.io/weigths": "x"}}, clusterIP="None")
    assert warned(ignored) == warned(msgspec.json.encode(ignored)) == ()


@given(st.dictionaries(st.text().map("lbproxy.io/{}".format), st.text(max_size=3), max_size=4))
def test_json_and_yaml_agree_on_any_key(said: dict[str, str]) -> None:
    value = test_decode.a_service({"annotations": said})
    assert warned(value) == warned(msgspec.json.encode(value))


def test_every_annotation_of_lbproxy_is_known() -> None:
    named = {value for name, value in vars(service_annotations).items() if name.endswith("_ANNOTATION")}
    assert named == unknown_annotations.KNOWN
