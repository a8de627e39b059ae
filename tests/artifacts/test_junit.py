"""JUnit XML: deferred is skipped, nothing proven is a failure, any message is valid XML."""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from diffoundry.artifacts.junit import junit_xml
from diffoundry.types import CheckResult, Limits, Measure, ParityResult

MEASURE = Measure(1e-7, 1e-8, 1.0, 120.0, 120.0, 1.0)


def test_each_status_has_its_place() -> None:
    checks = (
        CheckResult("call", "x", "passed", measure=MEASURE, limits=Limits(cosine=0.9)),
        CheckResult("call", "y", "failed", message="off by\n\x00 & <much>"),
        CheckResult("image", "image", "deferred", message="needs a Mac"),
        CheckResult("image", "accuracy", "info"),
    )
    root = Xml.fromstring(junit_xml("v", {"a": (ParityResult("unet", checks),)}))
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert set(cases) == {"call: x", "call: y", "image", "image: accuracy"}
    failure = cases["call: y"].find("failure")
    assert failure is not None and failure.get("message") == "off by"
    assert "<much>" in (failure.text or "")
    skipped = cases["image"].find("skipped")
    assert skipped is not None and skipped.get("message") == "needs a Mac"
    assert "cosine=0.9" in (cases["call: x"].findtext("system-out") or "")
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("4", "1", "1")


def test_suites_and_results_without_checks_are_failures() -> None:
    root = Xml.fromstring(junit_xml("v", {"a": (), "b": (ParityResult("unet", ()),)}))
    assert root.get("failures") == "2"
